"""What an update costs as K, m, the group and the picture grow: exponents, measured and of the counted operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks import figures, flops
from benchmarks.bound import STAGES, needs_of
from benchmarks.measure import Row, Settings, Spread
from benchmarks.shapes import Bench, var_shaped
from benchmarks.updates import stages
from varl.config import MethodConfig, TrainConfig
from varl.sampling import Sampling

__all__ = ["TITLE", "exponent", "rows", "straightness"]

TITLE = "scaling: exponent of the seconds over that of the counted operations (ours / baseline)"
METHOD = MethodConfig(middle="grid:8", prompts=1, group=4, continuations=2)


@dataclass(frozen=True)
class Sweep:
    """One setting that grows.

    Attributes:
        name, values: of the setting.
        configs: one a value.
        stage: which seconds count, ``whole`` or ``update``.
    """

    name: str
    values: tuple[int, ...]
    configs: list[TrainConfig]
    stage: str = "whole"


def sweeps(settings: Settings) -> list[Sweep]:
    """K, m, the group and the picture, each alone."""
    width = 512 if settings.full else 256

    def config(pixels: int = 256, **changes: object) -> TrainConfig:
        method = replace(METHOD, **changes)  # type: ignore[arg-type]
        return var_shaped(pixels, width, 2, method=method, sampling=Sampling(), micro_batch=4)

    many = (1, 2, 4, 8) if settings.full else (1, 2, 4)
    grids = (4, 6, 8, 10, 14) if settings.full else (6, 10, 14)
    groups = (2, 4, 8, 16) if settings.full else (2, 4, 8)
    pixels = (64, 128, 256, 512) if settings.full else (64, 128, 256)
    return [
        Sweep("K", many, [config(continuations=k) for k in many]),
        Sweep("side of m's grid", grids, [config(middle=f"grid:{side}") for side in grids], stage="update"),
        Sweep("group", groups, [config(group=g) for g in groups]),
        Sweep("side of the picture, px", pixels, [config(p, middle="quarter") for p in pixels]),
    ]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def straightness(x: Sequence[float], y: Sequence[float]) -> float:
    """R squared of the straight line through (x, y)."""
    slope, rest = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + rest)
    return float(1 - left.var() / np.var(y))


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Every sweep of prefix updates, and their figure."""
    found, drawn = [], []
    for sweep in sweeps(settings):
        benches = [Bench(config, settings, folder, decoder=False) for config in sweep.configs]
        counted = [_operations(bench, sweep.stage) for bench in benches]
        rounds: list[list[float]] = []
        for turn in range(1 + settings.rounds):
            seconds = [_seconds(bench, sweep.stage) for bench in benches]
            rounds += [seconds] if turn else []  # the first one warms up
        expected = exponent(sweep.values, counted)
        exponents = [exponent(sweep.values, seconds) for seconds in rounds]
        ratio = Spread.of([e / expected for e in exponents])
        name = f"exponent in the {sweep.name}: {', '.join(map(str, sweep.values))}"
        group = f"prefix update, {'whole' if sweep.stage == 'whole' else 'update stage'}"
        found.append(Row(group, name, "", Spread.of(exponents), Spread.exact(expected), ratio, "seconds / operations"))
        straight = Spread.of([straightness(counted, seconds) for seconds in rounds])
        found.append(
            Row(group, "  R squared of seconds = a + b operations", "", straight, Spread.exact(1.0), straight, "a line")
        )
        drawn.append((sweep, counted, np.array(rounds)))
    if settings.figures is not None:
        _draw(drawn, settings.figures / "performance-scaling.png")
    return found


def _operations(bench: Bench, stage: str) -> float:
    counted = needs_of(bench, "prefix")
    if stage == "update":
        counted = {name: units for name, units in counted.items() if name in STAGES["update"]}
    return flops.of(bench, "prefix", counted)


def _seconds(bench: Bench, stage: str) -> float:
    return stages(bench.step("prefix"))[stage]


def _draw(drawn: list[tuple[Sweep, list[float], np.ndarray]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(3.2 * len(drawn), 3), constrained_layout=True)
    for axis, (sweep, counted, rounds) in zip(axes, drawn, strict=True):
        slope, rest = np.polyfit(counted, np.median(rounds, 0), 1)
        line = np.array(counted) * slope + rest
        low, middle, high = np.quantile(rounds, (0.25, 0.5, 0.75), axis=0)
        axis.errorbar(sweep.values, middle, (middle - low, high - middle), fmt="o", label="measured")
        axis.plot(sweep.values, line, "-", label="a + b x counted operations")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=sweep.name,
            title="prefix update" if sweep.stage == "whole" else "update stage of it",
        )
        axis.set_xticks(sweep.values, [str(value) for value in sweep.values])
        axis.set_yticks(middle, [f"{seconds:.2g}" for seconds in middle])
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figures.save(figure, path)
