"""What rewards return, and what they are asked for, is checked before anything else works with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from varl.rewards.base import FailureLog, Polygon, RewardOutput
from varl.rewards.guard import told

__all__ = ["MOST_CHARACTERS", "MOST_POINTS", "checked", "checked_polygons", "checked_text"]

MOST_POINTS = 5_000
"""Points that the regions of one picture may have together, of which each has at least one: rasterising takes time and
memory for each."""
MOST_CHARACTERS = 5_000
"""Characters of text in one picture, wanted or read: words are compared each with each."""


def checked(output: RewardOutput, batch: int, failures: FailureLog | None = None) -> RewardOutput:
    """A copy of the output on the CPU, with non-finite scores marked as failed and failed scores NaN.

    A picture whose regions are no polygons or have more than ``MOST_POINTS`` points, or whose text is none or longer
    than ``MOST_CHARACTERS``, is failed; a failed picture has no region.

    Args:
        failures: where the reasons of these pictures, and those of failed scores, are counted.

    Raises:
        ValueError: if a field does not hold ``batch`` entries, or a part has no name of its own.
    """

    def vector(name: str, value: Any, dtype: torch.dtype) -> Tensor:
        given = torch.as_tensor(value)
        if given.is_complex():
            raise ValueError(f"{name} must hold real numbers, has complex ones")
        tensor = given.detach().to("cpu", dtype, copy=True)
        if tensor.shape != (batch,):
            raise ValueError(f"{name} must hold {batch} numbers for {batch} pictures, has shape {tuple(tensor.shape)}")
        return tensor

    score = vector("score", output.score, torch.float32)
    failed = vector("failed", output.failed, torch.bool) | ~score.isfinite()
    for name, field in (("regions", output.regions), ("texts", output.texts)):
        if field is not None and len(field) != batch:
            raise ValueError(f"{name} must hold {batch} entries for {batch} pictures, has {len(field)}")
    for name in output.parts:
        if not isinstance(name, str) or name in ("", "score"):
            raise ValueError(f"a part needs a name other than 'score', got {name!r}")
    parts = {name: vector(f"parts[{name!r}]", value, torch.float32) for name, value in output.parts.items()}

    reasons = ["no finite score, or marked as failed by the reward" if flag else "" for flag in failed.tolist()]
    regions, texts = output.regions, output.texts
    if regions is not None:
        regions = [_each(checked_polygons, own, [], i, reasons) for i, own in enumerate(regions)]
    if texts is not None:
        texts = [_each(checked_text, text, "", i, reasons) for i, text in enumerate(texts)]
    for reason in filter(None, dict.fromkeys(reasons)):
        if failures is not None:
            failures.add(reason, reasons.count(reason))
    failed = torch.tensor([bool(reason) for reason in reasons], dtype=torch.bool)
    if regions is not None:
        regions = [[] if reason else own for own, reason in zip(regions, reasons, strict=True)]
    return RewardOutput(score.masked_fill(failed, torch.nan), failed, regions, parts, texts)


def _each(check: Any, value: Any, otherwise: Any, picture: int, reasons: list[str]) -> Any:
    """What a check makes of a picture's value; what it raises is why the picture fails, if nothing else is yet."""
    try:
        return check(value)
    except (ValueError, TypeError) as error:
        reasons[picture] = reasons[picture] or told(error)
        return otherwise


def checked_polygons(own: Any) -> list[Polygon]:
    """A copy of one picture's regions.

    Raises:
        ValueError: if one is no polygon, or they have more than ``MOST_POINTS`` points.
    """
    polygons, points = [], 0
    for polygon in own:
        given = polygon.detach().cpu() if isinstance(polygon, Tensor) else polygon
        array = np.asarray(given, np.float32).copy()
        points += max(len(array), 1) if array.ndim else 0  # empty ones count: there may be no end of them
        if points > MOST_POINTS:
            raise ValueError(
                f"the regions of a picture may have {MOST_POINTS:,} points together, these have {points:,} or more; "
                "give simpler outlines"
            )
        if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
            raise ValueError(f"regions hold polygons [points, 2] of finite numbers, not {array.tolist()!r:.100}")
        polygons.append(array)
    return polygons


def checked_text(text: Any) -> str:
    """The text of one picture.

    Raises:
        TypeError: if it is none.
        ValueError: if it is longer than ``MOST_CHARACTERS``.
    """
    if not isinstance(text, str):
        raise TypeError(f"texts hold texts, not {text!r:.100}")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the text of a picture may have {MOST_CHARACTERS:,} characters, this one has {len(text):,}")
    return text
