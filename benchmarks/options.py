"""What moves the bound: options of a recipe, each with what it saves of a whole update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import flops
from benchmarks.bound import needs_of
from benchmarks.measure import Row, Settings
from benchmarks.shapes import Bench, Kind
from benchmarks.updates import Case, cases
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
        without: the recipe to compare with; by default the case's own.
        slow: compiles for minutes first, so only a full run has it.
    """

    name: str
    kind: Kind
    case: str
    change: Callable[[TrainConfig], TrainConfig]
    without: Callable[[TrainConfig], TrainConfig] = lambda config: config
    slow: bool = False


def _sampling(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, sampling=replace(config.sampling, **changes))


def _policy(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, policy=replace(config.policy, **changes))


def _method(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, method=replace(config.method, **changes))


def _as_many(config: TrainConfig) -> TrainConfig:
    """A suffix group large enough to train as many sequences as are reused."""
    return _method(group=config.method.group * config.method.continuations)(config)


VAR, FINE = "var", "fine"
OPTIONS = (
    Option("rollouts without guidance", "prefix", VAR, _sampling(guidance=0.0)),
    Option("bf16 rollouts", "prefix", VAR, _policy(rollout_precision="bfloat16")),
    Option("bf16 everywhere", "prefix", VAR, _policy(precision="bfloat16")),
    Option("compiled blocks", "prefix", VAR, _policy(compile=True), slow=True),
    Option("rollouts without guidance", "suffix", VAR, _sampling(guidance=0.0)),
    Option("no gradient through the shared prefix", "suffix", VAR, _method(prefix_gradient=False)),
    Option("continuations reused, against as many drawn", "suffix", VAR, _method(suffix_state="reused"), _as_many),
    Option("prefix valued at 512 px", "prefix", FINE, _method(value_at="grid:32")),
)


def _of_two(case: Case) -> Case:
    """A case with the smallest group: its ratios need no more."""
    return replace(case, config=_method(group=2)(case.config))


@dataclass
class _Arm:
    """A recipe under one kind of update, which several options may be compared with."""

    config: TrainConfig
    kind: Kind
    bench: Bench
    seconds: list[float]


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Every option against the recipe without it, all in turn."""
    made: list[_Arm] = []

    def arm(case: Case, config: TrainConfig, kind: Kind) -> _Arm:
        for other in made:
            if (other.config, other.kind) == (config, kind):
                return other
        made.append(_Arm(config, kind, Bench(config, settings, folder, case.decoder), []))
        return made[-1]

    every = {name: case if settings.full else _of_two(case) for name, case in cases(settings).items()}
    options, pairs = [o for o in OPTIONS if o.case in every and (settings.full or not o.slow)], []
    for option in options:
        case = every[option.case]
        configs = (option.without(case.config), option.change(case.config))
        pairs.append([arm(case, config, option.kind) for config in configs])
    for turn in range(1 + settings.rounds):
        for one in made:
            took = one.bench.step(one.kind).seconds
            one.seconds += [took] if turn else []  # the first one warms up
    found = []
    for option, (without, own) in zip(options, pairs, strict=True):
        operations = [flops.of(a.bench, a.kind, needs_of(a.bench, a.kind)) for a in (without, own)]
        text = f"without / with; operations counted: {operations[0] / operations[1]:.2f}"
        group = f"{every[option.case].name}: {option.kind} update"
        found.append(Row.speedup(group, option.name, own.seconds, without.seconds, text))
    return found
