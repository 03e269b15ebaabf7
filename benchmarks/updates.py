"""Whole prefix and suffix updates, and their stages, against the naive way and against their bound."""

from __future__ import annotations

import gc
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.bound import STAGES, arms, best, needs_of
from benchmarks.measure import Goal, Row, Settings, Spread, timed
from benchmarks.shapes import Bench, Kind, Naive, Step, extent, inkling, paper, var_shaped
from varl.config import MethodConfig, TrainConfig
from varl.sampling import Sampling

__all__ = ["TITLE", "Case", "cases", "rows", "stages"]

TITLE = "updates: the library against the naive way (baseline / ours), and its bound (bound / ours)"
AGREE = 1e-4
"""How far losses and gradient norms may be apart, relative."""
SAME_TOKENS = 0.99
"""The share of trained tokens that the naive way must draw alike; rounding flips a draw now and then."""
BOUND = Goal(0.85)


@dataclass(frozen=True)
class Case:
    """A model, a schedule and a recipe to measure.

    Attributes:
        sizes: batch sizes at which the best cost of a token is looked for.
        goal: for the update stage of a prefix update, in times naive.
    """

    name: str
    config: TrainConfig
    sizes: tuple[int, ...]
    decoder: bool = True
    goal: float | None = None


def cases(settings: Settings) -> dict[str, Case]:
    """Inkling with OCR; VAR at 256 pixels, which is all that a short run has; 1024 pixels with a small width."""
    one = extent(settings)
    goal = 3.5 if one.pixels == 256 else None
    var = Case(f"{one.name}, small tokenizer", one.config(paper()), one.batches, goal=goal)
    if settings.short:
        return {"var": var}
    width, group, sizes, sampling = (128, 4, (1, 2, 4), paper()) if settings.full else (64, 2, (1, 2), Sampling())
    method = MethodConfig(middle="grid:16", prompts=1, group=group, continuations=2)
    fine = Case(
        f"VAR of width {width}, depth 2, 1024 px, no decoder",
        var_shaped(1024, width, 2, method=method, sampling=sampling, micro_batch=2),
        sizes,
        decoder=False,
        goal=9.0,
    )
    return {"inkling": Case("Inkling with OCR", inkling(2, settings.threads), (16, 32)), "var": var, "fine": fine}


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Every case, prefix and suffix."""
    return [row for case in cases(settings).values() for row in case_rows(case, settings, folder)]


def case_rows(case: Case, settings: Settings, folder: Path) -> list[Row]:
    """One case: whole updates and stages.

    Raises:
        AssertionError: if losses, gradient norms or draws of the two ways differ.
    """
    bench, found = Bench(case.config, settings, folder, case.decoder), []
    kinds: tuple[Kind, ...] = ("prefix", "suffix")
    for kind in kinds:
        found += _kind_rows(case, bench, kind, settings)
    return found


def _kind_rows(case: Case, bench: Bench, kind: Kind, settings: Settings) -> list[Row]:
    first = bench.step(kind)
    plain = bench.naive(kind, first.batch)
    check(first, plain)
    ours: dict[str, list[float]] = defaultdict(list)
    naive: dict[str, list[float]] = defaultdict(list)
    costs = arms(bench, kind, plain.finished, case.sizes)
    alone: dict[str, list[float]] = defaultdict(list)
    for turn in range(settings.rounds):
        gc.collect()
        step, plain = bench.step(kind), bench.naive(kind, first.batch)
        for name, seconds in stages(step).items():
            ours[name].append(seconds)
        for name, seconds in {"whole": sum(plain.seconds.values()), **plain.seconds}.items():
            naive[name].append(seconds)
        for name, arm in costs.items():
            if turn == 0:
                arm.work()
            alone[name].append(timed(arm.work, settings.device))
    group = f"{case.name}: {kind} update"
    counted, unit = needs_of(bench, kind), best(alone, costs)
    bounds = {
        stage: sum(counted[cost] * unit[cost] for cost in kinds if cost in counted) for stage, kinds in STAGES.items()
    }
    bounds["whole"] = sum(bounds.values())
    against = {name: Row.speedup(group, name, ours[name], naive[name], "naive / ours") for name in naive}
    if kind == "prefix" and case.goal is not None:
        against["update"] = replace(against["update"], goal=Goal(case.goal))
    of_bound = []
    for name in naive:
        share = Spread.of([bounds[name] / seconds for seconds in ours[name]])
        text = f"bound / ours; needs {_describe(counted, name)}"
        goal = BOUND if name == "whole" else None
        row = Row(
            group, f"{name}, of its bound", "s", Spread.of(ours[name]), Spread.exact(bounds[name]), share, text, goal
        )
        of_bound.append(row)
    return [*against.values(), *of_bound]


def check(step: Step, plain: Naive) -> None:
    """That both ways took the same step.

    Raises:
        AssertionError: if they did not.
    """
    for name, ours, theirs in (
        ("losses", step.record["loss"], plain.loss),
        ("gradient norms", step.record["gradient_norm"], plain.norm),
    ):
        if not abs(ours - theirs) <= AGREE * max(abs(ours), abs(theirs)):
            raise AssertionError(f"{name} of the library and of the naive way differ: {ours} and {theirs}")
    if plain.same_tokens < SAME_TOKENS:
        raise AssertionError(f"only {plain.same_tokens:.1%} of the trained tokens are drawn alike by the naive way")


def stages(step: Step) -> dict[str, float]:
    """Seconds of the stages that the naive way has too, and of the whole update."""
    s = step.stages
    return {
        "whole": step.seconds,
        "rollout": s["rollout"],
        "decode": s["decode"],
        "reward": s["reward"],
        "update": s["logp"] + s["backward"] + s.get("reference", 0.0),
        "optimizer": s["optimizer"],
    }


def _describe(counted: dict[str, int], stage: str) -> str:
    kinds = [cost for costs in STAGES.values() for cost in costs] if stage == "whole" else STAGES[stage]
    return ", ".join(f"{counted[cost]:,} {cost}" for cost in kinds if cost in counted)
