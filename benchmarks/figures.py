"""Where the time of an update goes, and what each saving gives, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.bound import STAGES
from benchmarks.measure import Row

matplotlib.use("Agg")
from matplotlib import pyplot  # the backend is chosen first

__all__ = ["save", "savings", "stages"]


def stages(rows: Sequence[Row], path: Path) -> None:
    """Seconds of every stage, the naive way's and ours, as shares of the whole naive update; from ``updates``."""
    groups = list(dict.fromkeys(row.group for row in rows))
    figure, axis = pyplot.subplots(figsize=(9, 0.75 * len(groups) + 1.2), constrained_layout=True)
    for number, group in enumerate(groups):
        found = {row.what: row for row in rows if row.group == group}
        whole = found["whole"].baseline.median
        left = np.zeros(2)
        for index, stage in enumerate(STAGES):
            parts = np.array([found[stage].baseline.median, found[stage].ours.median]) / whole
            label = stage if number == 0 else None
            axis.barh([3 * number, 3 * number + 1], parts, left=left, color=f"C{index}", label=label)
            left += parts
    names = [f"{group}{way}" for group in groups for way in (", naive", ", ours")]
    places = [3 * number + way for number in range(len(groups)) for way in (0, 1)]
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("seconds, of those of the naive update")
    axis.legend(ncols=len(STAGES), frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1))
    save(figure, path)


def savings(rows: Sequence[Row], path: Path) -> None:
    """How many times longer an update takes without each saving; from ``savings``."""
    rows = [row for row in rows if row.group.endswith("update")]
    kinds = [row.group.split(": ")[-1] for row in rows]
    figure, axis = pyplot.subplots(figsize=(8, 0.3 * len(rows) + 1), constrained_layout=True)
    middles = np.array([row.ratio.median for row in rows])
    errors = [middles - [row.ratio.low for row in rows], [row.ratio.high for row in rows] - middles]
    colours = ["C0" if kind.startswith("prefix") else "C1" for kind in kinds]
    axis.barh(range(len(rows)), middles - 1, left=1, xerr=errors, color=colours)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(
        range(len(rows)), [f"{row.what} ({kind})" for row, kind in zip(rows, kinds, strict=True)], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel("seconds of an update without the saving, over those with all")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
