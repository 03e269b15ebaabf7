"""The least an update can cost: what the method needs, counted, times the best measured cost of each.

An update needs tokens drawn (each twice with guidance: with and without the condition), trained (forward, backward) and
scored by the reference, pictures decoded and scored, and one step of the optimizer. What a token costs depends on where
it lies, since later tokens attend to more, so prefix and suffix are counted and measured apart. The best cost of a kind
is the least over batch sizes, each measured alone, on the schedule, model and machine of the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import generators
from benchmarks.shapes import Bench, Kind
from varl.rollout import Rollout, rollout
from varl.scoring import log_probs

__all__ = ["STAGES", "Arm", "Needs", "arms", "best", "needs"]

STAGES = {
    "rollout": ("draw prefix", "draw suffix"),
    "decode": ("decode",),
    "reward": ("score",),
    "update": ("train prefix", "train suffix", "reference prefix", "reference suffix"),
    "optimizer": ("optimizer",),
}
"""Which kinds of cost make up each stage."""

Needs = dict[str, int]


def needs(
    kind: Kind,
    *,
    prompts: int,
    group: int,
    continuations: int,
    prefix: int,
    suffix: int,
    guided: bool,
    reference: bool,
    reuses: bool = False,
    prefix_gradient: bool = True,
) -> Needs:
    """What an update needs, by kind of cost: tokens, pictures, steps.

    Args:
        kind: of the update; a suffix update's group shares one prefix.
        prompts, group, continuations: P, G and K; K counts in prefix updates only.
        prefix, suffix: tokens of one sequence before and from the middle step on, to where it is valued.
        guided: whether tokens are drawn with guidance.
        reference: whether there is a KL to a reference.
        reuses: a suffix update trains the continuations of a prefix update, and draws nothing.
        prefix_gradient: if not, a suffix update only runs the prefix forward, which costs what the reference does.
    """
    heads = prompts if kind == "suffix" and not reuses else prompts * group
    tails = prompts * group * (continuations if kind == "prefix" or reuses else 1)
    # In a suffix update the prefix is computed once a group: its keys and values are needed, with gradient.
    trained = {"prefix": heads * prefix, "suffix": 0 if kind == "prefix" else tails * suffix}
    counts = {
        "draw prefix": heads * prefix * (1 + guided) * (not reuses),
        "draw suffix": tails * suffix * (1 + guided) * (not reuses),
        "decode": tails * (not reuses),
        "score": tails * (not reuses),
        "train prefix": trained["prefix"] * prefix_gradient,
        "train suffix": trained["suffix"],
        "reference prefix": trained["prefix"] * (reference + (not prefix_gradient)),
        "reference suffix": trained["suffix"] * reference,
        "optimizer": 1,
    }
    return {name: count for name, count in counts.items() if count}


def needs_of(bench: Bench, kind: Kind) -> Needs:
    """What an update of a bench needs."""
    config, schedule, plan = bench.trainer.config, bench.trainer.schedule, bench.plan(kind)
    prefix = schedule.prefix_tokens(plan.branch_at)
    return needs(
        kind,
        prompts=config.method.prompts,
        group=config.method.group,
        continuations=config.method.continuations,
        prefix=prefix,
        suffix=schedule.prefix_tokens(plan.until) - prefix,
        guided=config.sampling.guidance > 0,
        reference=bench.trainer.reference is not None,
        reuses=plan.reuses,
        prefix_gradient=config.method.prefix_gradient or kind == "prefix",
    )


@dataclass(frozen=True)
class Arm:
    """Something to measure: the kind of cost, and how many units of it one call does."""

    cost: str
    units: int
    work: Callable[[], object]


def best(found: dict[str, list[float]], arms: dict[str, Arm]) -> dict[str, float]:
    """Seconds a unit of every kind of cost: the median of a batch size, the least over batch sizes."""
    costs: dict[str, float] = {}
    for name, arm in arms.items():
        cost = sorted(found[name])[len(found[name]) // 2] / arm.units
        costs[arm.cost] = min(cost, costs.get(arm.cost, cost))
    return costs


def arms(bench: Bench, kind: Kind, finished: Tensor, sizes: tuple[int, ...]) -> dict[str, Arm]:
    """Every kind of cost that an update of this kind has, alone, at several batch sizes.

    Args:
        finished: all sequences of the update, [pictures, tokens of all steps].
        sizes: batch sizes in rows.
    """
    found = {f"{arm.cost} x{rows}": arm for rows in sizes for arm in _token_arms(bench, kind, finished, rows)}
    found |= _picture_arms(bench, finished, sizes)
    found["optimizer"] = Arm("optimizer", 1, _optimizer(bench))
    counted = needs_of(bench, kind)
    return {name: arm for name, arm in found.items() if arm.cost in counted}


def _token_arms(bench: Bench, kind: Kind, finished: Tensor, rows: int) -> list[Arm]:
    trainer, schedule, plan = bench.trainer, bench.trainer.schedule, bench.plan(kind)
    policy, reference, sampling = trainer.policy, trainer.reference, trainer.config.sampling
    m, guided = plan.branch_at, sampling.guidance > 0
    prefix, suffix = range(m), range(m, len(schedule))
    condition = policy.condition(bench.prompts()[:1], schedule).repeat(rows)
    sequences = finished[:1].expand(rows, -1)
    tokens = rows * schedule.prefix_tokens(m)
    rest = rows * schedule.tokens - tokens
    seed = generators(policy, (0,), rows)

    def precise(work: Callable[[], object], drawing: bool = False) -> Callable[[], object]:
        def run() -> None:
            with trainer.precision(drawing):
                work()

        return run

    def draw(until: int | None = None, start: Rollout | None = None) -> Rollout:
        return rollout(policy, condition, sampling, seed, until=until, start=start, keep_state=until is not None)

    def train(steps: range) -> None:
        log_probs(policy, condition, sequences, steps, prefix=shared if steps.start else None).logp.sum().backward()
        policy.trainable.zero_grad(set_to_none=True)

    @torch.no_grad()
    def score(steps: range) -> None:
        assert reference is not None
        log_probs(reference, condition, sequences, steps, prefix=shared if steps.start else None)

    with trainer.precision(drawing=True):
        start = draw(m)
    with torch.no_grad(), trainer.precision():
        shared = policy.prefill(condition.select([0]), sequences[:1], m)
    found = [
        Arm("draw prefix", tokens * (1 + guided), precise(lambda: draw(m), True)),
        Arm("draw suffix", rest * (1 + guided), precise(lambda: draw(start=start), True)),
        Arm("train prefix", tokens, precise(lambda: train(prefix))),
        Arm("train suffix", rest, precise(lambda: train(suffix))),
    ]
    if reference is not None:
        found.append(Arm("reference prefix", tokens, precise(lambda: score(prefix))))
        found.append(Arm("reference suffix", rest, precise(lambda: score(suffix))))
    return found


def _picture_arms(bench: Bench, finished: Tensor, sizes: tuple[int, ...]) -> dict[str, Arm]:
    trainer = bench.trainer
    policy, schedule = trainer.policy, trainer.schedule
    images = torch.cat([policy.decode(part, schedule).float().cpu() for part in finished.split(max(sizes))])
    prompts = bench.prompts()
    shown = [prompts[row * len(prompts) // len(finished)] for row in range(len(finished))]

    def decode(rows: int) -> Callable[[], object]:
        return lambda: policy.decode(finished[:rows], schedule)

    found = {f"decode x{rows}": Arm("decode", rows, decode(rows)) for rows in sizes}
    # All pictures at any size: what a picture costs to read depends on what is in it.
    return {**found, f"score x{len(finished)}": Arm("score", len(finished), lambda: trainer.reward(images, shown))}


def _optimizer(bench: Bench) -> Callable[[], object]:
    """Clipping and one step of AdamW, fused where torch can."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in bench.trainer.learner.parameters]
    for twin in twins:
        twin.grad = torch.ones_like(twin)
    optimizer = torch.optim.AdamW(twins, lr=1e-12, fused=True)

    def work() -> None:
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        optimizer.step()

    return work
