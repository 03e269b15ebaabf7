"""Logits, log-probabilities, losses and gradients of every family, in every precision, against the CPU's in fp32."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from families import shaken
from gpu.measuring import PRECISIONS, Precision, Report, difference, differences
from gpu.pairs import EMBEDDED, Pair, every
from varl import Sampling, log_probs
from varl.config import MethodConfig, OptimizerConfig
from varl.learner import Batch, Learner
from varl.loading import frozen_copy
from varl.policy import Condition, Policy
from varl.rollout import Rollout
from varl.scoring import Scores

precisions = pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
REHEARSED = ("var", "infinity")
"""Families that a rehearsal tries in tf32, which a CPU has to imitate, and in bf16."""
MIDDLE, ROWS, GROUP = 2, 2, 3
CPU = torch.device("cpu")
EXPECTED: dict[tuple[str, str], Any] = {}
"""The CPU's numbers, by family and name."""


def expected(pair: Pair, name: str, make: Any) -> Any:
    if (pair.name, name) not in EXPECTED:
        EXPECTED[pair.name, name] = make()
    return EXPECTED[pair.name, name]


@torch.no_grad()
def forced(policy: Policy, condition: Condition, actions: Tensor) -> Tensor:
    """Logits of given actions, in one pass."""
    return policy.logits(policy.hidden(condition, actions, range(len(condition.schedule))))


def stepwise(policy: Policy, condition: Condition, actions: Tensor, guidance: float) -> Tensor:
    """The same from caches, grid by grid."""
    state, found = policy.start(condition, guidance), []
    for step in range(len(condition.schedule)):
        found.append(policy.next_logits(state).flatten(1))
        policy.advance(state, actions[:, condition.schedule.tokens_of(step)])
    return torch.cat(found, 1)


LOGITS = {
    "forced": forced,
    "stepwise": lambda *given: stepwise(*given, 0.0),
    "guided": lambda *given: stepwise(*given, 1.5),
}


@pytest.fixture(autouse=True)
def _in_a_rehearsal(request: pytest.FixtureRequest, device: torch.device) -> None:
    """Leaves out what a CPU would need minutes for."""
    given = request.node.callspec.params
    if device.type == "cpu" and given["precision"].name != "fp32" and given["pair"] not in REHEARSED:
        pytest.skip("a rehearsal tries two families in this precision")


@every
@precisions
@pytest.mark.parametrize("way", LOGITS)
def test_logits(pair: Pair, precision: Precision, way: str, report: Report) -> None:
    cpu, there = pair.conditions(ROWS)
    actions = pair.actions(ROWS)
    wanted = expected(pair, f"logits {way}", lambda: LOGITS[way](pair.cpu, cpu, actions))
    with precision.on(pair.device):
        found = LOGITS[way](pair.there, there, actions.to(pair.device))
    assert found.device == pair.device
    report.near(f"{pair.name}, {precision.name}: logits, {way}", found, wanted, precision.logits)


TRUNCATED = Sampling(guidance=1.5, top_k=3, top_p=0.9, temperature=0.8)
ASKED: dict[str, dict[str, Any]] = {
    "all": {"entropy": True},
    "kept": {"keep": 0.4, "entropy": 0.5},
    "per event": {"per_event": True},
    "in chunks": {"chunk": 5, "entropy": True},
    "exact KL": {"reference": True},
    "guided": {"guidance": Sampling(guidance=1.5)},
    "guided, truncated": {"guidance": TRUNCATED},
    "suffix": {"steps": MIDDLE},
    "shared prefix": {"steps": MIDDLE, "shared": GROUP, "entropy": True, "reference": True, "keep": 0.5},
}


def asked(pair: Pair, policy: Policy, device: torch.device, name: str) -> tuple[Scores, Scores]:
    """What ``log_probs`` gives for one way of asking: with gradients recorded."""
    condition = policy.condition(pair.prompts(ROWS)).repeat(GROUP)
    options, schedule = dict(ASKED[name]), condition.schedule
    if name == "guided, truncated" and policy.classes == 2:
        options["guidance"] = Sampling(guidance=1.5, top_p=0.9)
    steps = range(options.pop("steps", 0), len(schedule))
    actions = pair.actions(ROWS * GROUP)
    before = schedule.offsets[steps.start]
    actions[:, :before] = actions[::GROUP, :before].repeat_interleave(GROUP, 0)
    span, generator = schedule.span(steps), torch.Generator().manual_seed(2)
    for option in ("keep", "entropy"):
        if isinstance(options.get(option), float):
            rows = () if option == "entropy" else (len(actions),)
            chosen = torch.rand(*rows, span.stop - span.start, generator=generator) < options[option]
            options[option] = chosen.to(device)
    if options.get("reference"):
        options["reference"] = expected(pair, f"reference {device}", lambda: shaken(pair.made(CPU), 0.1).to(device))
    return log_probs(policy, condition, actions.to(device), steps, **options)


@every
@precisions
@pytest.mark.parametrize("name", ASKED)
def test_log_probabilities(pair: Pair, precision: Precision, name: str, report: Report) -> None:
    if name == "guided, truncated" and precision.name != "fp32":
        pytest.skip("rounding moves classes over the edge of what may be drawn")
    wanted = expected(pair, f"scores {name}", lambda: asked(pair, pair.cpu, CPU, name))
    with precision.on(pair.device):
        found = asked(pair, pair.there, pair.device, name)
    assert found.logp.device == pair.device
    assert found.logp.requires_grad
    for part in ("logp", "entropy", "kl"):
        value = getattr(wanted, part)
        assert (value is None) == (getattr(found, part) is None)
        if value is not None:
            allowed = precision.kl if part == "kl" else precision.scores
            report.near(f"{pair.name}, {precision.name}: {part}, {name}", getattr(found, part), value, allowed)


@dataclass(frozen=True)
class Kind:
    """A kind of update: the trained steps, how many rows share their prefix, and the method."""

    first: int = 0
    stop: int | None = None
    shared: int = 1
    micro_batch: int = 4
    method: dict[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)


KINDS = {
    "full": Kind(method={"beta": 0.1}),
    "full, masked": Kind(method={"beta": 0.0}),
    "prefix, exact KL": Kind(stop=MIDDLE, method={"beta": 0.1, "kl": "exact"}),
    "prefix, as sampled": Kind(stop=MIDDLE, method={"beta": 0.1, "logp": "sampling"}, sampling=Sampling(1.0, 0, 0.95)),
    "suffix": Kind(MIDDLE, shared=ROWS * GROUP, method={"beta": 0.1}),
    "suffix, prefix without gradient": Kind(MIDDLE, shared=GROUP, method={"beta": 0.1, "prefix_gradient": False}),
    "reused": Kind(MIDDLE, shared=GROUP, micro_batch=GROUP, method={"beta": 0.1, "kl": "k2"}),
}


def learnt(pair: Pair, policy: Policy, reference: Policy, device: torch.device, kind: Kind) -> tuple[Any, Any]:
    """An update from fixed sequences: its record, and the gradient. No step is taken."""
    schedule = pair.cpu.default_schedule
    rows, steps = ROWS * GROUP, range(kind.first, kind.stop or len(schedule))
    condition = policy.condition(pair.prompts(ROWS)).repeat(GROUP)
    if kind.shared == rows:
        condition = policy.condition(pair.prompts(1)).repeat(rows)
    actions, generator = pair.actions(rows), torch.Generator().manual_seed(3)
    before, span = schedule.offsets[steps.start], schedule.span(steps)
    actions[:, :before] = actions[:: kind.shared, :before].repeat_interleave(kind.shared, 0)
    length = span.stop - span.start
    batch = Batch(
        Rollout(condition, actions.to(device), len(schedule)),
        steps,
        torch.randn(rows, generator=generator),
        torch.arange(rows) != 1,
        None if kind.shared == GROUP else (torch.rand(rows, length, generator=generator) < 0.5).float(),
        shared=kind.shared,
        cancelled=True,
    )
    learner = Learner(
        policy, reference, MethodConfig(**kind.method), OptimizerConfig(), kind.sampling, kind.micro_batch
    )
    gradients: dict[str, Tensor] = {}
    clip = learner.distributed.clip

    def record(parameters: Any, largest: float) -> Any:
        named = policy.trainable.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return clip(parameters, largest)

    learner.distributed.clip = record  # type: ignore[method-assign]
    return learner.learn(batch, lambda _: nullcontext()), gradients


@lru_cache(maxsize=4)
def trained(pair: Pair, device: torch.device) -> tuple[Policy, Policy]:
    """A policy whose gradients are asked for, and its reference."""
    policy = pair.made(device)
    return policy, shaken(frozen_copy(pair.made(CPU)), 0.1).to(device)  # type: ignore[attr-defined]


@every
@precisions
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(pair: Pair, precision: Precision, kind: str, report: Report) -> None:
    if kind == "prefix, as sampled" and precision.name != "fp32":
        pytest.skip("rounding moves classes over the edge of what may be drawn")
    if pair.name == EMBEDDED and kind != "suffix":
        pytest.skip("the small one is tried in this kind")
    if precision.name == "tf32" and kind not in ("full", "prefix, exact KL", "suffix"):
        pytest.skip("other kinds are made of the same products")
    if "without gradient" in kind and not pair.cpu.shares_keys:
        pytest.skip("its steps read no prefix")
    wanted, gradients = expected(pair, f"update {kind}", lambda: learnt(pair, *trained(pair, CPU), CPU, KINDS[kind]))
    with precision.on(pair.device):
        found, there = learnt(pair, *trained(pair, pair.device), pair.device, KINDS[kind])
    name = f"{pair.name}, {precision.name}"
    assert all(gradient.device == pair.device for gradient in there.values())
    report.within(f"{name}: gradients, {kind}", differences(there, gradients), precision.gradients)
    for figure in ("loss", "entropy_by_step", "kl_by_step", "loss_share_by_step"):
        if figure in wanted:
            values = (torch.tensor(one[figure], dtype=torch.double) for one in (found, wanted))
            allowed = precision.kl if figure == "kl_by_step" else precision.scores
            report.within(f"{name}: {figure}, {kind}", difference(*values), allowed)
