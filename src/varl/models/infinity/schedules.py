"""Infinity's scale schedules: a list of thirteen grids an aspect ratio; a resolution is a prefix of it."""

from __future__ import annotations

__all__ = ["RATIOS", "RESOLUTIONS", "SIDES", "final_grid", "grids", "nearest_ratio"]

Grid = tuple[int, int]

RESOLUTIONS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Name of a resolution (about how many pixels) -> how many grids make it."""
SIDES = {256: "0.06M", 512: "0.25M", 768: "0.60M", 1024: "1M"}
"""Side in pixels of the square picture -> name of the resolution."""

_TALL = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
_WIDE = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}


def _read(text: str) -> tuple[Grid, ...]:
    pairs = (pair.split("x") for pair in text.split())
    return tuple((int(height), int(width)) for height, width in pairs)


RATIOS: dict[float, tuple[Grid, ...]] = {ratio: _read(text) for ratio, text in _TALL.items()}
"""Height / width, truncated to three digits as upstream names it -> the (height, width) of its thirteen grids."""
RATIOS |= {_WIDE[ratio]: tuple((w, h) for h, w in RATIOS[ratio]) for ratio in _WIDE}


def nearest_ratio(aspect_ratio: float) -> float:
    """The name of the ratio (height / width) that is nearest."""
    return min(RATIOS, key=lambda ratio: abs(ratio - aspect_ratio))


def grids(resolution: int | str, aspect_ratio: float) -> tuple[Grid, ...]:
    """The grids of a resolution at the nearest ratio.

    Args:
        resolution: a name of ``RESOLUTIONS``, or the side in pixels of the square picture of that resolution.
        aspect_ratio: height / width.

    Raises:
        ValueError: if there is no such resolution, or the ratio is not positive.
    """
    name = SIDES.get(resolution) if isinstance(resolution, int) else resolution
    if name not in RESOLUTIONS:
        known = ", ".join(f"{name} ({side})" for side, name in SIDES.items())
        raise ValueError(f"Infinity has no resolution {resolution!r}; there are {known}")
    if not aspect_ratio > 0:
        raise ValueError(f"an aspect ratio is height / width and positive, got {aspect_ratio}")
    return RATIOS[nearest_ratio(aspect_ratio)][: RESOLUTIONS[name]]


def final_grid(schedule: tuple[Grid, ...], aspect_ratio: float = 1.0) -> Grid:
    """The largest grid of the ratio that a schedule belongs to; positions are measured in it at every resolution.

    A schedule belongs to a ratio whose list begins with it, otherwise to the ratio nearest to its last grid's. Where
    the lists of several ratios begin so (very short schedules), ``aspect_ratio`` decides if it is one of them.
    """
    fitting = [ratio for ratio, known in RATIOS.items() if known[: len(schedule)] == schedule]
    asked = nearest_ratio(aspect_ratio)
    if asked in fitting:
        return RATIOS[asked][-1]
    height, width = schedule[-1]
    return RATIOS[min(fitting or RATIOS, key=lambda ratio: abs(ratio - height / width))][-1]
