"""Learning curves of finished runs: read, compared and drawn. ``benchmarks.results`` makes the runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

__all__ = ["Curve", "interval", "level_at", "load", "mean_over", "print_report", "reaching", "read_curve"]

LEVELS = (0.6, 0.7)
LAST = 3
"""Evaluations whose mean is called the level at the end of a budget; a single one is too noisy."""

Seconds = dict[str, float]
"""Seconds of one update of each kind."""


@dataclass(frozen=True)
class Curve:
    """Held-out word accuracy of one run.

    Attributes:
        pictures: scored in training, at each evaluation.
        updates: how many updates of each kind were taken by then.
        accuracy: word accuracy on the held-out prompts.
    """

    pictures: np.ndarray
    updates: list[dict[str, int]]
    accuracy: np.ndarray

    def seconds(self, each: Seconds) -> np.ndarray:
        """Seconds of training at each evaluation, at so many seconds an update of each kind."""
        return np.array([sum(n * each[kind] for kind, n in counts.items()) for counts in self.updates])


def read_curve(path: Path) -> Curve:
    """The curve of a run folder."""
    kinds = [json.loads(line)["kind"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    points = [json.loads(file.read_text()) for file in sorted((path / "evaluations").glob("update-*.json"))]
    return Curve(
        np.array([p["training_pictures"] for p in points]),
        [dict(Counter(kinds[: p["update"]])) for p in points],
        np.array([p["metrics"]["word_accuracy"]["value"] for p in points]),
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over runs and the half width of its 95% interval (Student's t)."""
    t = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
    n = len(values)
    half = t.get(n - 1, 1.96) * values.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(values.mean()), float(half)


def reaching(x: np.ndarray, accuracy: np.ndarray, level: float) -> float:
    """The first x at which a curve, interpolated, reaches a level; infinity if it does not."""
    above = np.flatnonzero(accuracy >= level)
    if len(above) == 0:
        return float("inf")
    i = above[0]
    if i == 0:
        return float(x[0])
    share = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def level_at(x: np.ndarray, accuracy: np.ndarray, budget: float) -> float:
    """Mean of the last three evaluations within a budget."""
    return float(accuracy[x <= budget * (1 + 1e-9)][-LAST:].mean())


def mean_over(x: np.ndarray, accuracy: np.ndarray, budget: float) -> float:
    """Mean of the interpolated curve from the start to a budget: what training had to offer all along."""
    at = np.linspace(0, min(budget, float(x[-1])), 201)
    return float(np.interp(at, x, accuracy).mean())


def load(data: Path, names: list[str]) -> dict[str, list[Curve]]:
    """The finished curves of every method, by seed; only seeds that every method has.

    Raises:
        SystemExit: if there is none, or they were not made from one base and budget.
    """
    found: dict[str, dict[int, dict]] = {}
    for name in names:
        runs = {int(p.stem.rsplit("-", 1)[1]): json.loads(p.read_text()) for p in data.glob(f"{name}-[0-9]*.json")}
        if runs:
            found[name] = runs
    if not found:
        raise SystemExit(f"no finished run in {data}; start with: python -m benchmarks.results run")
    if len({(r["base"], r["budget"]) for runs in found.values() for r in runs.values()}) > 1:
        raise SystemExit(f"the runs in {data} differ in base or budget; remove those that do not belong")
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    return {
        name: [Curve(np.array(runs[s]["pictures"]), runs[s]["updates"], np.array(runs[s]["accuracy"])) for s in seeds]
        for name, runs in found.items()
    }


def print_report(
    curves: dict[str, list[Curve]], each: dict[str, Seconds], labels: dict[str, str], figure: Path, console: Console
) -> None:
    """Print the tables at equal pictures and at equal seconds, and save the figure."""
    pictures = min(int(c.pictures[-1]) for runs in curves.values() for c in runs)
    x_pictures = {name: [c.pictures for c in runs] for name, runs in curves.items()}
    drawn = {"pictures scored in training": x_pictures}
    console.print(_table(curves, x_pictures, labels, pictures, "pictures"))
    _print_gains(curves, x_pictures, labels, pictures, console)
    if curves.keys() <= each.keys():
        x_seconds = {name: [c.seconds(each[name]) for c in runs] for name, runs in curves.items()}
        budget = min(float(x[-1]) for runs in x_seconds.values() for x in runs)
        console.print(_table(curves, x_seconds, labels, budget, "seconds"))
        _print_gains(curves, x_seconds, labels, budget, console)
        drawn["seconds of training"] = x_seconds
    else:
        console.print("no measured seconds; run: python -m benchmarks.results time")
    _plot(curves, drawn, labels, figure)
    console.print(f"figure: {figure}")


def _table(
    curves: dict[str, list[Curve]], x: dict[str, list[np.ndarray]], labels: dict[str, str], budget: float, unit: str
) -> Table:
    seeds = len(next(iter(curves.values())))
    table = Table(title=f"{seeds} paired seeds, mean ± 95% interval, at {budget:.0f} {unit}")
    for column in ("method", "base", "mean", "level", "rise", "relative", *(f"{unit} to {level}" for level in LEVELS)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, runs in curves.items():
        base = np.array([c.accuracy[0] for c in runs])
        level = np.array([level_at(at, c.accuracy, budget) for at, c in zip(x[name], runs, strict=True)])
        mean = np.array([mean_over(at, c.accuracy, budget) for at, c in zip(x[name], runs, strict=True)])
        cells = [_show(*interval(values), 3) for values in (base, mean, level, level - base)]
        cells.append(f"{level.mean() / base.mean() - 1:+.1%}")
        for wanted in LEVELS:
            reached = np.array([reaching(at, c.accuracy, wanted) for at, c in zip(x[name], runs, strict=True)])
            cells.append(_show_reached(reached))
        table.add_row(labels[name], *cells)
    return table


def _print_gains(
    curves: dict[str, list[Curve]],
    x: dict[str, list[np.ndarray]],
    labels: dict[str, str],
    budget: float,
    console: Console,
) -> None:
    """The paired differences between the last method and each other."""
    *others, ours = curves
    for title, measure in (("mean", mean_over), ("level", level_at)):
        values = {
            name: np.array([measure(at, c.accuracy, budget) for at, c in zip(x[name], runs, strict=True)])
            for name, runs in curves.items()
        }
        for name in others:
            gain = _show(*interval(values[ours] - values[name]), 3)
            console.print(f"{title}: {labels[ours]} - {labels[name]}, paired: {gain}")


def _show(value: float, half: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def _show_reached(values: np.ndarray) -> str:
    """The median over runs, and how many of them reached the level."""
    reached = int(np.isfinite(values).sum())
    median = np.median(values)
    share = f"{reached}/{len(values)}"
    return f"{median:.0f} ({share})" if np.isfinite(median) else f"not reached ({share})"


def _plot(
    curves: dict[str, list[Curve]], axes_x: dict[str, dict[str, list[np.ndarray]]], labels: dict[str, str], path: Path
) -> None:
    """Held-out word accuracy, mean and 95% interval over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(axes_x), 4), layout="constrained")
    colors = ("tab:gray", "tab:orange", "tab:blue", "tab:green", "tab:red")
    for axes, (unit, x) in zip(
        figure.subplots(1, len(axes_x), sharey=True, squeeze=False)[0], axes_x.items(), strict=True
    ):
        for color, (name, runs) in zip(colors, curves.items(), strict=False):
            grid = np.linspace(0, min(at[-1] for at in x[name]), 60)
            y = np.stack([np.interp(grid, at, c.accuracy) for at, c in zip(x[name], runs, strict=True)])
            axes.plot(grid, y.mean(0), color=color, label=labels[name])
            if len(runs) > 1:
                half = np.array([interval(column)[1] for column in y.T])
                axes.fill_between(grid, y.mean(0) - half, y.mean(0) + half, color=color, alpha=0.2)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out word accuracy")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
