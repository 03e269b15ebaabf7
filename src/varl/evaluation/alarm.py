"""Reward hacking: the reward that is trained on rises while held-out metrics fall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

from varl.evaluation.held_out import Estimate

__all__ = ["falling_metrics", "rise"]

SIGMAS = 2.0


def rise(values: Sequence[float]) -> tuple[float, float]:
    """How much the second half of a series lies above the first, and the standard error of that (Welch).

    Args:
        values: oldest first; the middle one of an odd number is left out. Those that are not finite are, too.

    Returns:
        (0, infinity) if a half has fewer than 2 values.
    """
    finite = [value for value in values if math.isfinite(value)]
    half = len(finite) // 2
    if half < 2:
        return 0.0, math.inf
    first, second = finite[:half], finite[-half:]
    return fmean(second) - fmean(first), math.sqrt((variance(first) + variance(second)) / half)


def falling_metrics(rewards: Sequence[float], changes: Mapping[str, Estimate]) -> list[str]:
    """The held-out metrics that fell while the training reward rose; reward hacking, if there is one.

    Both must be beyond noise: the reward's ``rise`` more than two standard errors, and a metric's whole 95% interval
    below 0.

    Args:
        rewards: mean reward of every update between two evaluations, oldest first.
        changes: for every held-out metric the paired difference, the later evaluation less the earlier.
    """
    value, error = rise(rewards)
    return [name for name, change in changes.items() if value > SIGMAS * error and change.high < 0]
