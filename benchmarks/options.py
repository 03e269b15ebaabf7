"""What moves the bound: options of a recipe, each with what it saves of a whole update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import Row, Settings
from benchmarks.shapes import Bench, Kind
from benchmarks.updates import cases
from varl.config import TrainConfig

__all__ = ["OPTIONS", "TITLE", "Option", "rows"]

TITLE = "options that move the bound: a whole update without the option over one with it (baseline / ours)"


@dataclass(frozen=True)
class Option:
    """A change of the recipe.

    Attributes:
        kind: of the update that it speeds up.
        case: which of the cases of the section ``updates`` it is measured on.
        change: the recipe with the option.
    """

    name: str
    kind: Kind
    case: int
    change: Callable[[TrainConfig], TrainConfig]


def _unguided(config: TrainConfig) -> TrainConfig:
    return replace(config, sampling=replace(config.sampling, guidance=0.0))


def _half(config: TrainConfig) -> TrainConfig:
    return replace(config, policy=replace(config.policy, precision="bfloat16"))


OPTIONS = (
    Option("rollouts without guidance", "prefix", 1, _unguided),
    Option("rollouts without guidance", "suffix", 1, _unguided),
    Option("bf16", "prefix", 1, _half),
)


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Every option against the recipe without it, in turn."""
    found = []
    for option in OPTIONS:
        case = cases(settings)[option.case]
        benches = [Bench(c, settings, folder, case.decoder) for c in (case.config, option.change(case.config))]
        seconds: list[list[float]] = [[], []]
        for turn in range(1 + settings.rounds):
            for bench, kept in zip(benches, seconds, strict=True):
                took = bench.step(option.kind).seconds
                kept += [took] if turn else []  # the first one warms up
        group = f"{case.name}: {option.kind} update"
        found.append(Row.speedup(group, option.name, seconds[1], seconds[0], "without / with"))
    return found
