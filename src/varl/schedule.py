"""Scale schedules: the grids of a next-scale model and everything counted from them.

Throughout the project a *step* is 0-based and emits one grid, and ``m`` counts steps: the prefix of ``m`` steps is
``steps[0], ..., steps[m - 1]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

__all__ = ["MiddleStep", "ScaleSchedule"]

MiddleStep = int | str
"""How a recipe names m: ``3`` or ``"3"`` (number of steps), ``"grid:8"``, ``"pixels:256"`` or ``"quarter"``."""


@dataclass(frozen=True)
class ScaleSchedule:
    """Token grids, coarse to fine.

    Args:
        grids: ``(height, width)`` of every step's token grid, in tokens.
        stride: picture pixels covered by one token of the final grid, per side. A step of side ``h`` then stands for
            pictures of ``h * stride`` pixels.

    Raises:
        ValueError: if there is no grid, or a side or the stride is not a positive integer.
    """

    grids: tuple[tuple[int, int], ...]
    stride: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple((int(h), int(w)) for h, w in self.grids))
        if not self.grids:
            raise ValueError("a schedule needs at least one grid")
        if any(h < 1 or w < 1 for h, w in self.grids) or self.stride < 1:
            raise ValueError(f"grid sides and stride must be positive, got {self.grids} with stride {self.stride}")

    @classmethod
    def square(cls, sides: tuple[int, ...] | list[int], stride: int = 16) -> ScaleSchedule:
        """A schedule of square grids, e.g. ``square([1, 2, 4], stride=16)``."""
        return cls(tuple((s, s) for s in sides), stride)

    def __len__(self) -> int:
        return len(self.grids)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each step, n_t = h_t w_t."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each step's first token in the flattened sequence, and the total at the end; length T + 1."""
        total, offsets = 0, [0]
        for count in self.counts:
            total += count
            offsets.append(total)
        return tuple(offsets)

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.offsets[-1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the final picture, in pixels."""
        h, w = self.grids[-1]
        return h * self.stride, w * self.stride

    def tokens_of(self, step: int) -> slice:
        """Where ``step`` lies in the flattened sequence."""
        return slice(self.offsets[step], self.offsets[step + 1])

    def span(self, steps: range) -> slice:
        """Where a run of consecutive steps lies in the flattened sequence.

        Raises:
            ValueError: if ``steps`` is empty, not consecutive, or leaves the schedule.
        """
        if len(steps) == 0 or steps.step != 1 or steps.start < 0 or steps.stop > len(self):
            raise ValueError(f"steps must be a non-empty consecutive range inside 0..{len(self)}, got {steps}")
        return slice(self.offsets[steps.start], self.offsets[steps.stop])

    def prefix_tokens(self, m: int) -> int:
        """Tokens of the first ``m`` steps."""
        return self.offsets[m]

    def step_of_token(self) -> list[int]:
        """The step of every token, in sequence order."""
        return [step for step, count in enumerate(self.counts) for _ in range(count)]

    def middle(self, m: MiddleStep) -> int:
        """Resolve a recipe's name of the middle step to the number of prefix steps, 1 <= m < T.

        ``quarter`` is the last step whose grid side sqrt(h w) is at most a quarter of the final one (m_256 at 1024
        pixels); ``grid:S`` the step whose side is S; ``pixels:P`` the step whose grid reaches P pixels; an integer the
        number of steps itself. For grids that are not square, a side is sqrt(h w) rounded.

        Raises:
            ValueError: if no step has that side or resolution (the message lists those that have one), or if the
                prefix or the suffix would be empty.
        """
        sides = [math.sqrt(h * w) for h, w in self.grids]
        kind, _, value = str(m).partition(":")
        if kind == "quarter" and not value:
            count = sum(side <= sides[-1] / 4 + 1e-9 for side in sides)
        elif kind.lstrip("-").isdigit() and not value:
            count = int(kind)
        elif kind in ("grid", "pixels") and value.isdigit():
            scale = 1 if kind == "grid" else self.stride
            found = [i + 1 for i, side in enumerate(sides) if round(side) * scale == int(value)]
            if not found:
                known = ", ".join(str(round(side) * scale) for side in sides)
                raise ValueError(f"m={m!r}: no step of the schedule has {kind} {value}; the steps have {known}")
            count = found[-1]
        else:
            raise ValueError(f"m={m!r} is not a middle step; use a number of steps, grid:S, pixels:P or quarter")
        if not 1 <= count < len(self):
            raise ValueError(f"m={m!r} is {count} of {len(self)} steps; a split needs 1 <= m <= {len(self) - 1}")
        return count

    def describe(self) -> str:
        """One line, e.g. ``1x1 2x2 4x4 (21 tokens, 64x64 pixels)``."""
        grids = " ".join(f"{h}x{w}" for h, w in self.grids)
        height, width = self.image_size
        return f"{grids} ({self.tokens} tokens, {width}x{height} pixels)"
