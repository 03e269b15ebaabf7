"""What the learner computes on the way to a step, value by value, and what it tells other processes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import varl.learner as module
from bits import SCHEDULE, Bits
from learning import ROWS, assert_close, batch, counting, drawn, gradients, learned, learner, stage
from small import make_inkling
from varl import Sampling, log_probs
from varl.algorithm import token_weights
from varl.config import MaskConfig, MethodConfig, OptimizerConfig
from varl.distributed import Distributed
from varl.learner import WATCHED, Learner
from varl.scoring import Scores

PLAIN = MethodConfig(beta=0)


def unchecked(**options: Any) -> MethodConfig:
    """Settings that a configuration may refuse together, as one of them has no effect: here it must have none."""
    method = copy.copy(PLAIN)
    for name, value in options.items():
        object.__setattr__(method, name, value)
    return method


def test_what_a_learner_is_made_of() -> None:
    policy, given = Bits(), Distributed()
    policy.label.weight.requires_grad_(False)
    options = OptimizerConfig(learning_rate=0.25, betas=(0.5, 0.75), weight_decay=0.125)
    own = Learner(policy, None, PLAIN, options, Sampling(), 3, given)
    assert own.distributed is given
    assert (own.micro_batch, own.updates_taken, own.guidance) == (3, 0, None)
    expected = [parameter for name, parameter in policy.named_parameters() if name != "label.weight"]
    assert len(own.parameters) == len(expected)
    assert all(one is other for one, other in zip(own.parameters, expected, strict=True))
    found = own.optimizers[""].defaults
    assert {name: found[name] for name in ("lr", "betas", "weight_decay", "fused")} == {
        "lr": 0.25,
        "betas": (0.5, 0.75),
        "weight_decay": 0.125,
        "fused": True,
    }


@pytest.mark.parametrize(("logp", "plain", "guided"), [("sampling", False, True), ("sampling", True, False)])
def test_whose_distribution_is_trained(logp: Any, plain: bool, guided: bool) -> None:
    sampling = Sampling() if plain else Sampling(top_k=2)
    assert learner(Bits(), MethodConfig(beta=0, logp=logp), sampling=sampling).guidance == (
        sampling if guided else None
    )
    assert learner(Bits(), PLAIN, sampling=Sampling(top_k=2)).guidance is None


def test_the_rate_without_a_warm_up() -> None:
    assert learner(Bits(), PLAIN, learning_rate=1e-2).rate() == 1e-2


def test_gradients_are_forgotten() -> None:
    own = learner(Bits(), PLAIN)
    for parameter in own.parameters:
        parameter.grad = torch.ones_like(parameter)
    own.zero_grad()
    assert all(parameter.grad is None for parameter in own.parameters)


class Partly(nn.Module):
    def __init__(self, undecayed: tuple[str, ...]) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Parameter(torch.zeros(i + 1)) for i in range(3))
        self.three.requires_grad_(False)
        self.undecayed = undecayed


def test_what_decays() -> None:
    def groups(*undecayed: str) -> list[tuple[list[int], float | None]]:
        found = module._groups(Partly(undecayed))
        return [([len(p) for p in group["params"]], group.get("weight_decay")) for group in found]

    assert groups("two", "three") == [([1], None), ([2], 0.0)]
    assert groups("one", "two") == [([1, 2], 0.0)]
    assert groups() == [([1, 2], None)]
    assert [len(group["params"]) for group in module._groups(nn.Linear(2, 2))] == [2]


def test_which_tokens_are_watched() -> None:
    assert WATCHED == 32
    assert module._watched([1, 4]).tolist() == [True] * 5
    found = module._watched([64, 48])
    assert found[:64].tolist() == [True, False] * 32
    assert (len(found), int(found[64:].sum())) == (112, 32)
    assert found[64:70].tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"epochs": 2}, False),
        ({"ratio": "step", "epochs": 2}, False),
        ({"ratio": "step"}, False),
        ({"beta": 0.1}, False),
        ({"beta": 0.1, "mask": MaskConfig(kl=True)}, True),
    ],
)
def test_which_tokens_the_head_must_see(options: dict[str, Any], kept: bool) -> None:
    own = learner(Bits(), unchecked(**options), Bits(1))
    mask, watched = torch.tensor([[0.0, 0.25, 0.0, 1.0]]), torch.tensor([True, False, False, False])
    found = own._keep(mask, watched)
    if not kept:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == [[True, True, False, True]]
        assert own._keep(mask, None).tolist() == [[False, True, False, True]]  # type: ignore[union-attr]
    assert own._keep(None, watched) is None


def test_whose_log_probabilities_are_asked_of_the_reference() -> None:
    policy = make_inkling()
    own = drawn(policy, "full", MethodConfig(middle=3, group=4))
    given = (own.sequences, range(2))
    for reference, method in (
        (None, MethodConfig(beta=0.1)),
        (make_inkling(1), MethodConfig(beta=0)),
        (make_inkling(1), MethodConfig(beta=0.1, kl="exact")),
    ):
        assert learner(policy, method, reference).reference_logp(*given) is None
    reference = make_inkling(1)
    with counting(reference) as found:
        logp = learner(policy, MethodConfig(beta=0.1), reference, 3).reference_logp(*given)
    assert found["tokens"] == 8 * 5
    assert logp is not None
    assert not logp.requires_grad
    expected = log_probs(reference, own.sequences.condition, own.sequences.actions, range(2)).logp
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)


def test_an_exact_kl_of_no_weight_is_not_computed() -> None:
    policy, reference = make_inkling(), make_inkling(1)
    made = drawn(policy, "prefix", MethodConfig(middle=3, group=4))
    with counting(reference) as found:
        log = learner(policy, unchecked(kl="exact"), reference).learn(made, stage)
    assert found["tokens"] == 0
    assert "kl_by_step" not in log


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("count", ["grid", "masked"])
def test_the_weights_of_tokens(kl: bool, count: Any) -> None:
    policy = Bits().double()
    made = batch(policy, range(1, 3))
    method = MethodConfig(beta=0.1, alpha=0.3, rescale=False, mask=MaskConfig(count=count, kl=kl))
    rows = torch.tensor([1, 4])
    made.reference_logp_BL = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    assert made.mask_BL is not None
    inputs, scores = learner(policy, method)._inputs(made, rows, None)
    plain = token_weights([2, 6], 0.3, rescale=False)
    if count == "grid":
        assert torch.equal(inputs.weight_BL, plain)
        assert inputs.kl_weight_BL is None
    else:
        masked = token_weights([2, 6], 0.3, rescale=False, mask_BL=made.mask_BL[rows], count="masked")
        assert torch.equal(inputs.weight_BL, masked)
        assert not torch.equal(masked, plain.expand_as(masked))
        assert inputs.kl_weight_BL is None if kl else torch.equal(inputs.kl_weight_BL, plain)  # type: ignore[arg-type]
    assert torch.equal(inputs.reference_logp_BL, made.reference_logp_BL[rows])  # type: ignore[arg-type]
    assert torch.equal(inputs.mask_BL, made.mask_BL[rows])  # type: ignore[arg-type]
    assert torch.equal(inputs.advantage_B, made.advantage_B[rows])
    assert torch.equal(inputs.valid_B, made.valid_B[rows])  # type: ignore[arg-type]
    assert torch.equal(inputs.old_logp_BL, scores.logp)
    assert not inputs.old_logp_BL.requires_grad
    assert list(inputs.step_of_token_L) == [1] * 2 + [2] * 6
    assert scores.entropy is not None
    later, scores = learner(policy, method)._inputs(made, rows, torch.zeros(2, 8))
    assert scores.entropy is None  # it is of the policy that drew
    assert not later.old_logp_BL.any()


# --- The log. ---


def test_the_figures_of_a_micro_batch() -> None:
    """Two rows of two steps, of 1 and 2 tokens; the second row is not valid."""
    policy = Bits().double()
    made = batch(policy, range(2))
    own = learner(policy, replace(PLAIN, alpha=0.0))
    rows = torch.tensor([1, 2])
    assert made.valid_B[rows].tolist() == [True, False]
    made.advantage_B[rows] = torch.tensor([-2.0, 5.0], dtype=torch.float64)
    made.mask_BL = torch.zeros(ROWS, 3)
    made.mask_BL[rows] = torch.tensor([[0.5, 1.0, 0.0], [1.0, 1.0, 1.0]])
    inputs, _ = own._inputs(made, rows, torch.zeros(2, 3, dtype=torch.float64))
    output = own._loss(inputs, made.divisor)
    entropy = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 9.0]])
    found = module._figures(inputs, output, Scores(inputs.logp_BL, entropy), made)
    assert found.keys() == {
        *("valid", "loss", "log_ratio_T", "log_ratio_max", "clip_fraction", "carrying", "weight_T"),
        *("rows", "entropy_T"),
    }
    assert int(found["valid"]) == 1
    assert found["rows"] == 2
    assert found["entropy_T"].tolist() == [3.0, 5.0]
    # A third of each token's weight, times the mask and the advantage's size, of the valid row.
    assert found["weight_T"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert {found["weight_T"].dtype, found["entropy_T"].dtype} == {torch.float64}
    assert float(found["log_ratio_max"]) == float(output.log_ratio_max_T.max())
    assert not found["loss"].requires_grad
    assert found["loss"] == output.loss
    without = module._figures(inputs, output, Scores(inputs.logp_BL), made)
    assert {"rows", "entropy_T"} & without.keys() == set()
    unmasked = replace(inputs, mask_BL=None)
    assert module._policy_weight(unmasked)[0].tolist() == pytest.approx([2 / 3] * 3)
    everyone = module._policy_weight(replace(unmasked, valid_B=None))
    assert everyone[1].tolist() == pytest.approx([5 / 3] * 3)
    assert module._figures(replace(inputs, valid_B=None), output, Scores(inputs.logp_BL), made)["valid"] == 2


def part(valid: int, loss: float, ratio: list[float], most: float, clip: float, weight: list[float]) -> dict[str, Any]:
    """Of which as many tokens carry the policy term as the clipped share says in tenths, or none."""
    values = {"valid": valid, "loss": loss, "log_ratio_T": ratio, "log_ratio_max": most}
    return values | {"clip_fraction": clip, "carrying": valid and round(clip * 10), "weight_T": weight}


def test_the_summary_of_several() -> None:
    one = part(3, 0.5, [1.0, 2.0], 4.0, 0.5, [1.0, 2.0])
    two = part(1, 0.25, [5.0, -2.0], 3.0, 0.1, [0.0, 1.0])
    found = module._summary([one, two])
    expected = {
        "loss": 0.75,
        "log_ratio_by_step": [2.0, 1.0],
        "log_ratio_max": 4.0,
        "clip_fraction": pytest.approx((0.5 * 5 + 0.1 * 1) / 6),
        "loss_share_by_step": [0.25, 0.75],
    }
    assert found == expected
    seen = [one | {"rows": 1, "entropy_T": [4.0, 0.0], "kl_T": [4.0, 8.0]}]
    seen += [two | {"rows": 3, "entropy_T": [0.0, 8.0], "kl_T": [0.0, 4.0]}]
    assert module._summary(seen) == expected | {"entropy_by_step": [1.0, 6.0], "kl_by_step": [3.0, 7.0]}


def test_the_summary_of_next_to_nothing() -> None:
    """Means over one row are its own, over none 0; shares of weights that are 0 are 0."""
    alone = module._summary([part(1, 0.5, [1.0, 2.0], 4.0, 0.5, [1e-12, 0.0])])
    assert (alone["log_ratio_by_step"], alone["clip_fraction"]) == ([1.0, 2.0], 0.5)
    assert alone["loss_share_by_step"] == pytest.approx([1.0, 0.0])
    none = module._summary([part(0, 0.0, [1.0, 2.0], 0.0, 0.5, [0.0, 0.0])])
    assert (none["log_ratio_by_step"], none["clip_fraction"]) == ([0.0, 0.0], 0.0)
    assert none["loss_share_by_step"] == [0.0, 0.0]


# --- Steps. ---


@pytest.mark.parametrize(("norm", "loss", "taken"), [(1.0, 1.0, True), (1.0, math.nan, False), (math.nan, 1.0, False)])
def test_a_step_is_taken_if_gradient_and_loss_are_finite(norm: float, loss: float, taken: bool) -> None:
    policy = Bits()
    own, made, before = learner(policy, PLAIN), batch(policy), policy.head.bias.detach().clone()
    policy.head.bias.grad = torch.zeros_like(policy.head.bias)
    policy.head.bias.grad[0] = norm
    found, stepped = own._step([{"loss": 1.0}, {"loss": loss}], made)
    assert stepped is taken
    assert math.isnan(found) if math.isnan(norm) else found == norm
    assert own.updates_taken == 0
    assert (policy.head.bias.grad is not None) is taken
    assert torch.equal(policy.head.bias.detach(), before) is not taken


def test_no_step_is_taken_for_nothing() -> None:
    policy = Bits()
    own, made = learner(policy, PLAIN), batch(policy)
    assert own._step([], made) == (0.0, False)
    made.valid_B[:] = False
    log = own.learn(made, stage, diagnose=True)
    assert "gradient_norm_by_step" not in log
    assert log["gradient_norm"] == 0


def test_later_epochs_score_with_the_new_weights_under_autocast() -> None:
    """Autocast keeps casts of weights; those of the first epoch would make the ratios of the second 1."""
    policy = Bits().requires_grad_(False)
    policy.head.requires_grad_(True)
    own = learner(policy, replace(PLAIN, epochs=2), learning_rate=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        log = own.learn(batch(policy), stage)
    assert log["log_ratio_max"] > 0.05


def test_the_first_micro_batch_alone() -> None:
    """Its gradients are added to what is there."""
    policy = Bits().double()
    made = batch(policy)
    own = learner(policy, PLAIN, micro_batch=3)
    own.backward_of_first(made)
    found = gradients(policy)
    own.backward_of_first(made)
    assert_close(gradients(policy), [2 * g for g in found])
    only = replace(made, valid_B=made.valid_B & torch.isin(torch.arange(ROWS), own._micro_batches(made)[0]))
    expected, _ = learned(policy, only, PLAIN)
    assert_close(found, expected)


# --- The norms of steps. ---


def test_the_norm_of_a_step_is_of_its_own_kl() -> None:
    """Only the second step's tokens differ from the reference; masked ones alone are counted in the policy term."""
    policy = Bits().double()
    made = batch(policy)
    made.advantage_B = torch.zeros_like(made.advantage_B)
    method = MethodConfig(beta=0.3, mask=MaskConfig(count="masked"))
    own = learner(policy, method, Bits(1).double())
    reference = log_probs(policy, made.sequences.condition, made.sequences.actions).logp.detach()
    reference[:, SCHEDULE.tokens_of(1)] += 0.5
    made.reference_logp_BL = reference
    norms = own._norms_by_step(made, [(made, rows) for rows in own._micro_batches(made)])
    assert [norms[0], norms[2]] == pytest.approx([0, 0], abs=1e-9)
    assert norms[1] > 1e-3
    assert all(parameter.grad is None for parameter in own.parameters)
