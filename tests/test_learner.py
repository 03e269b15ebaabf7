"""The learner's bookkeeping: steps that are skipped, rates, epochs, its log and its state."""

import math

import pytest
import torch
from torch import Tensor, nn

from bits import Bits
from learning import ROWS, assert_close, batch, gradients, learned, learner, stage
from small import make_inkling, make_prompts
from varl import Sampling, log_probs, rollout
from varl.config import MethodConfig
from varl.learner import Batch
from varl.rollout import row_generators
from varl.run.state import new_moments, stored_moments


def weights(policy: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch", [ROWS, 2])
def test_a_non_finite_loss_skips_the_step(bad: float, micro_batch: int) -> None:
    policy = Bits()
    made = batch(policy)
    made.advantage_B[0] = bad
    own = learner(policy, MethodConfig(beta=0), micro_batch=micro_batch)
    before = weights(policy)
    log = own.learn(made, stage)
    assert log["skipped"] == log["not_finite"] == 1
    assert same(before, weights(policy))
    assert own.updates_taken == 0
    assert not own.optimizers[""].state
    made.advantage_B[0] = 1.0
    assert own.learn(made, stage)["skipped"] == 0
    assert own.updates_taken == 1
    assert not same(before, weights(policy))


def test_a_non_finite_gradient_skips_the_step() -> None:
    policy = Bits()
    policy.head.bias.register_hook(lambda g: g * math.nan)
    before = weights(policy)
    assert learner(policy, MethodConfig(beta=0)).learn(batch(policy), stage)["skipped"] == 1
    assert same(before, weights(policy))


def test_a_batch_without_a_valid_group_moves_nothing() -> None:
    """Without this, momentum and weight decay would move the weights when a reward engine is down."""
    policy = Bits()
    made = batch(policy)
    own = learner(policy, MethodConfig(beta=0))
    own.learn(made, stage)
    before = weights(policy)
    made.valid_B = torch.zeros(ROWS, dtype=torch.bool)
    log = own.learn(made, stage)
    assert same(before, weights(policy))
    assert log["skipped"] == 1
    assert log["not_finite"] == 0
    assert own.updates_taken == 1
    assert log["loss"] == 0


def test_terms_that_cancel_take_no_step_and_are_still_to_be_finite() -> None:
    policy = Bits()
    made = batch(policy)
    made.cancelled = True
    own, before = learner(policy, MethodConfig(beta=0)), weights(policy)
    log = own.learn(made, stage)
    assert (log["skipped"], log["not_finite"], own.updates_taken) == (1, 0, 0)
    made.advantage_B[0] = math.nan
    assert own.learn(made, stage)["not_finite"] == 1
    assert same(before, weights(policy))


def test_the_warm_up() -> None:
    policy = Bits()
    own = learner(policy, MethodConfig(), learning_rate=1e-5, warmup_from=1e-6, warmup_updates=20)
    for steps, rate in ((0, 1e-6), (10, 5.5e-6), (19, 9.55e-6), (20, 1e-5), (500, 1e-5)):
        own.updates_taken = steps
        assert own.rate() == pytest.approx(rate)
    assert learner(policy, MethodConfig(), learning_rate=1e-5).rate() == pytest.approx(1e-5)
    # A warm-up never starts above where it ends.
    own = learner(policy, MethodConfig(), learning_rate=1e-7, warmup_from=1e-6, warmup_updates=20)
    assert own.rate() == pytest.approx(1e-7)


def test_the_rate_is_used() -> None:
    policy = Bits()
    own = learner(
        policy, MethodConfig(beta=0), learning_rate=1e-3, warmup_from=1e-4, warmup_updates=2, weight_decay=0.0
    )
    made = batch(policy)
    made.rate = 0.5
    before = policy.head.bias.detach().clone()
    own.learn(made, stage)
    # Adam's first step has the size of the learning rate.
    assert float((policy.head.bias.detach() - before).abs().max()) == pytest.approx(0.5e-4, rel=1e-3)
    assert own.rate() == pytest.approx(5.5e-4)


def test_the_gradient_is_clipped() -> None:
    policy = Bits()
    log = learner(policy, MethodConfig(beta=0), clip_norm=1e-3).learn(batch(policy), stage)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(policy)))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert log["gradient_norm"] > 0.01


def test_the_first_step_goes_the_right_way() -> None:
    policy = Bits()
    made = batch(policy, mask=False)
    made.valid_B = torch.ones(ROWS, dtype=torch.bool)

    def likelihood() -> Tensor:
        with torch.no_grad():
            return log_probs(policy, made.sequences.condition, made.sequences.actions).logp.sum(1)

    before = likelihood()
    learner(policy, MethodConfig(beta=0, alpha=0), weight_decay=0.0).learn(made, stage)
    assert float((made.advantage_B * (likelihood() - before)).sum()) > 0.01


def test_later_epochs_are_off_policy() -> None:
    policy = Bits()
    own = learner(policy, MethodConfig(beta=0, epochs=3, clip=1e-3), learning_rate=1e-2)
    log = own.learn(batch(policy), stage)
    assert own.updates_taken == 1
    assert log["log_ratio_max"] > 1e-3
    assert log["clip_fraction"] > 0.1
    own = learner(policy, MethodConfig(beta=0), learning_rate=1e-2)
    log = own.learn(batch(policy), stage)
    assert log["log_ratio_max"] == log["clip_fraction"] == 0


def test_the_sampling_distribution_is_trained_where_asked() -> None:
    policy, sampling = Bits().double(), Sampling(guidance=0.5, temperature=0.7)
    made = batch(policy, mask=False)
    made.valid_B = torch.ones(ROWS, dtype=torch.bool)
    method = MethodConfig(beta=0, alpha=0, logp="sampling")
    found, _ = learned(policy, made, method, sampling=sampling)
    logp = log_probs(policy, made.sequences.condition, made.sequences.actions, guidance=sampling).logp
    expected = torch.autograd.grad(-(made.advantage_B[:, None] * logp).mean(), list(policy.parameters()))
    assert_close(found, list(expected), tolerance=1e-7)
    plain, _ = learned(policy, made, MethodConfig(beta=0, alpha=0), sampling=sampling)
    assert max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True)) > 1e-3


@pytest.mark.parametrize("kl", ["k3", "k2", "exact"])
def test_truncated_log_probabilities_can_be_trained(kl: str) -> None:
    policy, reference = make_inkling(), make_inkling(1)
    sampling = Sampling(guidance=1.0, top_k=2, top_p=0.9)
    drawn = rollout(policy, policy.condition(make_prompts(2)), sampling, row_generators((0,), 2))
    made = Batch(drawn, range(3), torch.tensor([1.0, -1.0]), torch.ones(2, dtype=torch.bool))
    method = MethodConfig(beta=0.01, kl=kl, logp="sampling", epochs=3)
    log = learner(policy, method, reference, sampling=sampling, learning_rate=1e-2).learn(made, stage)
    assert log["skipped"] == 0
    assert math.isfinite(log["loss"])


def test_diagnosis() -> None:
    policy, reference = Bits(), Bits(1)
    made = batch(policy)
    one, log = learned(policy, made, MethodConfig(beta=0.3), reference)
    norms = log["gradient_norm_by_step"]
    assert len(norms) == 3
    # Norms of parts whose sum is the gradient.
    assert max(norms) <= log["gradient_norm"] + sum(norms) - max(norms) + 1e-6
    assert log["gradient_norm"] <= sum(norms) + 1e-6
    kept = made.mask_BL.clone()
    made.mask_BL[:, 1:] = 0
    _, log = learned(policy, made, MethodConfig(beta=0), None)
    assert log["gradient_norm_by_step"][1:] == [0, 0]
    assert log["gradient_norm_by_step"][0] == pytest.approx(log["gradient_norm"], rel=1e-5)
    assert log["masked_share_by_step"] == pytest.approx([float(kept[:, 0].mean()), 0, 0])
    assert learner(policy, MethodConfig(beta=0)).learn(made, stage).get("gradient_norm_by_step") is None
    assert len(one) == len(list(policy.parameters()))


def test_entropy_and_kl_in_the_log() -> None:
    policy, reference = Bits(), Bits(1)
    made = batch(policy, range(1, 3))
    made.valid_B = torch.ones(ROWS, dtype=torch.bool)
    _, log = learned(policy, made, MethodConfig(beta=0.1, kl="exact"), reference, 3)
    with torch.no_grad():
        scores = log_probs(
            policy, made.sequences.condition, made.sequences.actions, made.steps, entropy=True, reference=reference
        )
    for key, values in (("entropy_by_step", scores.entropy), ("kl_by_step", scores.kl)):
        assert log[key] == pytest.approx([float(values[:, :2].mean()), float(values[:, 2:].mean())], abs=1e-5)


def test_a_warm_up_counts_updates_whatever_the_epochs() -> None:
    policy = Bits()
    own = learner(policy, MethodConfig(beta=0, epochs=2), learning_rate=1e-3, warmup_from=0.0, warmup_updates=4)
    rates = []
    for _ in range(3):
        own.learn(batch(policy), stage)
        rates.append(own.optimizers[""].param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3])


def test_the_state_resumes() -> None:
    one, made = Bits(), batch(Bits())
    first = learner(one, MethodConfig(beta=0), warmup_updates=5)
    first.learn(made, stage)
    two = Bits()
    two.load_state_dict(one.state_dict())
    second = learner(two, MethodConfig(beta=0), warmup_updates=5)
    second.updates_taken = first.updates_taken
    stored = stored_moments(one.named_parameters(), first.optimizers[""])
    for name, value in new_moments(two.named_parameters(), second.optimizers[""], stored).items():
        value.copy_(stored[name])
    for own in (first, second):
        own.learn(made, stage)
    assert same(weights(one), weights(two))
    assert second.updates_taken == 2
