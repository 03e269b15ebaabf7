"""The learner's gradient, held against losses written out and against invariances."""

import copy
import math

import pytest
import torch
from torch import Tensor

from bits import SCHEDULE, Bits, labels
from learning import ROWS, assert_close, batch, learned
from small import make_inkling, make_prompts
from varl import Sampling, log_probs, rollout, updates
from varl.config import MaskConfig, MethodConfig
from varl.learner import Batch
from varl.policy import Policy
from varl.rollout import row_generators

METHODS = {
    "k3": MethodConfig(beta=0.3),
    "k2": MethodConfig(beta=0.3, kl="k2"),
    "exact": MethodConfig(beta=0.3, kl="exact", rescale=False),
    "masked": MethodConfig(beta=0.3, mask=MaskConfig(count="masked")),
    "masked kl": MethodConfig(beta=0.3, mask=MaskConfig(count="masked", kl=True)),
    "sampling": MethodConfig(beta=0.3, logp="sampling"),
    "epochs": MethodConfig(beta=0.3, epochs=2),
    "clipped": MethodConfig(beta=0.3, epochs=2, clip=1e-4),
    "step": MethodConfig(beta=0.3, epochs=2, ratio="step"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_nothing(name: str, micro_batch: int) -> None:
    policy, reference = Bits(), Bits(1)
    made, sampling = batch(policy, range(1, 3)), Sampling(guidance=0.5, temperature=0.8)
    whole, log = learned(policy, made, METHODS[name], reference, ROWS, sampling=sampling)
    parts, parts_log = learned(policy, made, METHODS[name], reference, micro_batch, sampling=sampling)
    assert_close(whole, parts)
    assert parts_log.keys() == log.keys()
    for key in log:
        assert parts_log[key] == pytest.approx(log[key], abs=1e-5), key
    assert sum(log["loss_share_by_step"]) == pytest.approx(1)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_change_nothing_for_inkling(micro_batch: int) -> None:
    policy, reference = make_inkling(), make_inkling(1)
    condition = policy.condition(make_prompts(4))
    made = Batch(
        sequences=rollout(policy, condition, None, row_generators((0,), 4)),
        steps=range(1, 4),
        advantage_B=torch.tensor([1.0, -0.5, 0.3, 0.2]),
        valid_B=torch.ones(4, dtype=torch.bool),
        mask_BL=(torch.rand(4, 49, generator=torch.Generator().manual_seed(0)) < 0.5).float(),
    )
    whole, _ = learned(policy, made, MethodConfig(), reference, 4)
    parts, _ = learned(policy, made, MethodConfig(), reference, micro_batch)
    assert_close(whole, parts)


def plain_loss(
    policy: Policy,
    reference: Policy,
    made: Batch,
    method: MethodConfig,
    old: Tensor | None = None,
) -> Tensor:
    """The loss of method.md, sections 4 to 6, token by token."""
    condition, actions = made.sequences.condition, made.sequences.actions
    schedule = condition.schedule
    logp, reference_logp = (
        torch.cat(
            [
                model.logits(model.hidden(condition, actions, range(s, s + 1)))
                .log_softmax(-1)
                .gather(-1, actions[:, schedule.tokens_of(s)].unsqueeze(-1))
                .flatten(2)
                .sum(-1)
                for s in made.steps
            ],
            1,
        )
        for model in (policy, reference)
    )
    reference_logp = reference_logp.detach()
    old = logp.detach() if old is None else old
    k = {s: 1 / schedule.counts[s] ** method.alpha for s in made.steps}
    norm = sum(k[s] * schedule.counts[s] for s in made.steps)
    total = logp.new_zeros(())
    for row in range(len(actions)):
        if not made.valid_B[row]:
            continue
        token = 0
        for step in made.steps:
            for _ in range(schedule.counts[step]):
                rho = (logp[row, token] - old[row, token]).exp()
                a = made.advantage_B[row]
                pg = -torch.minimum(rho * a, rho.clamp(1 - method.clip, 1 + method.clip) * a)
                m = 1.0 if made.mask_BL is None else made.mask_BL[row, token]
                d = reference_logp[row, token] - logp[row, token]
                total = total + k[step] / norm * (m * pg + method.beta * (d.exp() - d - 1))
                token += 1
    return total / len(actions)


@pytest.mark.parametrize("steps", [range(3), range(2), range(1, 3), range(2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_written_out(steps: range, masked: bool) -> None:
    policy, reference = Bits().double(), Bits(1).double()
    made, method = batch(policy, steps, mask=masked), MethodConfig(beta=0.3, alpha=0.7)
    found, log = learned(policy, made, method, reference, 3)
    loss = plain_loss(policy, reference, made, method)
    expected = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_close(
        found, [torch.zeros_like(f) if e is None else e for f, e in zip(found, expected, strict=True)], tolerance=1e-7
    )


def test_gradients_by_finite_differences() -> None:
    policy, reference = Bits().double(), Bits(1).double()
    made, method = batch(policy, range(1, 3)), MethodConfig(beta=0.3)
    found, _ = learned(policy, made, method, reference, 2)
    with torch.no_grad():
        old = log_probs(policy, made.sequences.condition, made.sequences.actions, made.steps).logp
        for parameter, gradient in zip(policy.parameters(), found, strict=True):
            flat, index = parameter.data.view(-1), int(gradient.abs().argmax())
            kept = flat[index].item()
            values = []
            for shift in (1e-5, -1e-5):
                flat[index] = kept + shift
                values.append(plain_loss(policy, reference, made, method, old).item())
            flat[index] = kept
            difference = (values[0] - values[1]) / 2e-5
            assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_a_suffix_update_of_inkling_written_out() -> None:
    """From draws to gradients: shared prefix, masks, PANW over the suffix, KL."""
    policy, reference = make_inkling(), make_inkling(1)
    method = MethodConfig(update="suffix", middle=2, group=4, beta=0.1)
    plan = updates.plan("suffix", method, policy.default_schedule)
    steps = range(2, 4)  # without the last grid, for the time of the plain loop
    drawn = updates.draw(policy, policy.condition(make_prompts(2)), plan, Sampling(top_p=0.9), (0,))
    value = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    advantages = updates.advantages(value, torch.ones(2, 4, dtype=torch.bool), method)
    expected_advantage = (value - value.mean(1, keepdim=True)) / (value.std(1, unbiased=False, keepdim=True) + 1e-6)
    made = Batch(
        sequences=drawn.trained,
        steps=steps,
        advantage_B=advantages.advantage_PG.flatten(),
        valid_B=~advantages.dropped_P.repeat_interleave(plan.group),
        mask_BL=(torch.rand(8, 45, generator=torch.Generator().manual_seed(1)) < 0.5).float(),
    )
    found, log = learned(policy, made, method, reference, 3)
    made.advantage_B = expected_advantage.flatten()
    loss = plain_loss(policy, reference, made, method)
    expected = torch.autograd.grad(loss, list(policy.trainable.parameters()))
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert_close(found, list(expected))


def test_vanilla_grpo_written_out() -> None:
    """alpha 0, beta 0, no mask, all steps: minus the mean over samples and tokens of A logp."""
    policy = make_inkling()
    method = MethodConfig(update="full", group=4, alpha=0, beta=0, mask=MaskConfig(enabled=False))
    assert not method.needs_reference
    plan = updates.plan("full", method, policy.default_schedule)
    drawn = updates.draw(policy, policy.condition(make_prompts(1)), plan, Sampling(), (0,))
    made = Batch(drawn.trained, plan.steps, torch.tensor([1.5, -0.5, -0.7, -0.3]), torch.ones(4, dtype=torch.bool))
    found, log = learned(policy, made, method, None, 2)
    hidden = policy.hidden(drawn.whole.condition, drawn.whole.actions, range(5))
    logp = policy.logits(hidden).log_softmax(-1).gather(-1, drawn.whole.actions.unsqueeze(-1)).squeeze(-1)
    loss = -(made.advantage_B[:, None] * logp).mean()
    assert_close(found, list(torch.autograd.grad(loss, list(policy.trainable.parameters()))))
    assert log["log_ratio_max"] == 0
    assert log["loss_share_by_step"] == pytest.approx([n / 194 for n in policy.default_schedule.counts], abs=1e-6)
    assert "kl_by_step" not in log


def test_one_continuation_makes_the_prefix_update_of_terminal_rewards() -> None:
    """K = 1, m = T - 1 against a plain loop over the prefix's tokens."""
    policy = Bits().double()
    method = MethodConfig(update="prefix", middle=2, group=4, continuations=1, alpha=0, beta=0)
    plan = updates.plan("prefix", method, SCHEDULE)
    drawn = updates.draw(policy, policy.condition(labels(2)), plan, Sampling(), (0,))
    advantage = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, _ = learned(policy, Batch(drawn.trained, plan.steps, advantage, torch.ones(8, dtype=torch.bool)), method)
    loss = sum(
        -advantage[row]
        * policy.logits(policy.hidden(drawn.trained.condition, drawn.trained.actions, range(2))).log_softmax(-1)[
            row, token, bit, drawn.trained.actions[row, token, bit]
        ]
        for row in range(8)
        for token in range(3)
        for bit in range(3)
    )
    expected = torch.autograd.grad(loss / (8 * 3), list(policy.parameters()))
    assert_close(found, list(expected), tolerance=1e-7)


def test_dropped_groups_carry_no_gradient() -> None:
    policy, reference = Bits().double(), Bits(1).double()
    made, method = batch(policy), MethodConfig(beta=0.3)
    found, log = learned(policy, made, method, reference)
    changed = Batch(
        made.sequences,
        made.steps,
        torch.where(made.valid_B, made.advantage_B, math.nan),
        made.valid_B,
        made.mask_BL,
    )
    other, other_log = learned(policy, changed, method, reference)
    assert other_log["skipped"] == log["skipped"] == 0
    assert_close(found, other, tolerance=1e-9)
    # What is left is what those rows alone give, by the same divisor.
    rows = made.valid_B.nonzero().flatten()
    sequences = copy.copy(made.sequences)
    sequences.condition, sequences.actions = sequences.condition.select(rows), sequences.actions[rows]
    alone = Batch(sequences, made.steps, made.advantage_B[rows], made.valid_B[rows], made.mask_BL[rows])
    kept, _ = learned(policy, alone, method, reference)
    assert_close(found, [g * len(rows) / ROWS for g in kept], tolerance=1e-9)
