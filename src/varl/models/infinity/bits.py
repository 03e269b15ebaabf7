"""Infinity's multi-scale binary spherical quantizer: bits of tokens, code maps, and their running sum.

No weights: a cell's code is the unit vector of its signs. With spatial patchify a token holds two by two of the
tokenizer's cells; its bit 4c + 2y + x is bit c of the cell at (y, x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.quantizer import resize_area
from varl.schedule import ScaleSchedule

__all__ = ["BitQuantizer", "Corrupt", "binarize", "resize_linear"]

Corrupt = Callable[[int, Tensor], Tensor]
"""(step, bits of its tokens [B, n, bits]) -> the bits that are drawn in their place."""


def resize_linear(x_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a map, up or down, bilinearly (align_corners false, no antialiasing)."""
    return x_BCHW if x_BCHW.shape[-2:] == grid else F.interpolate(x_BCHW, size=grid, mode="bilinear")


def binarize(z_BDHW: Tensor) -> Tensor:
    """Bits, bool: whether a channel of the normalised vector is positive (0 is not)."""
    return F.normalize(z_BDHW, dim=1, eps=1e-12) > 0


@dataclass(frozen=True)
class BitQuantizer:
    """Between actions [B, L, bits] and maps of the tokenizer.

    Args:
        width: bits d of a cell.
        patchify: a token is two by two cells, of 4 d bits.
    """

    width: int
    patchify: bool = False

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return self.width * (4 if self.patchify else 1)

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The size, in cells, of a grid of tokens."""
        return (2 * grid[0], 2 * grid[1]) if self.patchify else grid

    def to_map(self, tokens_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h * w, bits] -> [B, d, cells]."""
        tokens = tokens_BLD.transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(tokens, 2) if self.patchify else tokens

    def to_tokens(self, map_BDHW: Tensor) -> Tensor:
        """[B, d, cells] -> [B, h * w, bits]."""
        cells = F.pixel_unshuffle(map_BDHW, 2) if self.patchify else map_BDHW
        return cells.flatten(2).transpose(1, 2)

    def codes(self, bits_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
        """Unit vectors of one grid's bits: fp32 [B, d, cells]."""
        return self.to_map(2 * bits_BLD.float() - 1, grid) / self.width**0.5

    def contribution(self, bits_BLD: Tensor, schedule: ScaleSchedule, step: int) -> Tensor:
        """What one grid adds to the sum, at the final size: fp32 [B, d, cells]."""
        return resize_linear(self.codes(bits_BLD, schedule.grids[step]), self.cells(schedule.grids[-1]))

    def empty(self, batch: int, schedule: ScaleSchedule, device: torch.device) -> Tensor:
        """The sum of no grids."""
        return torch.zeros(batch, self.width, *self.cells(schedule.grids[-1]), device=device)

    def input(self, total_BDHW: Tensor, schedule: ScaleSchedule, step: int) -> Tensor:
        """What the transformer reads for a grid: the sum of all coarser ones at its size, [B, n, bits]."""
        return self.to_tokens(resize_linear(total_BDHW, self.cells(schedule.grids[step])))

    def accumulate(self, actions_BLD: Tensor, schedule: ScaleSchedule, inputs: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The sum of the steps that ``actions`` cover (all, or the first), and the inputs of steps 1 to ``inputs`` - 1.

        Raises:
            ValueError: if the actions end inside a step, or have another number of bits.
        """
        if actions_BLD.ndim != 3 or actions_BLD.shape[2] != self.bits:
            raise ValueError(f"actions are [batch, tokens, {self.bits}] bits, got {list(actions_BLD.shape)}")
        tokens = actions_BLD.shape[1]
        if tokens not in schedule.offsets:
            raise ValueError(f"{tokens} tokens end inside a step; steps end at {schedule.offsets[1:]}")
        total, made = self.empty(len(actions_BLD), schedule, actions_BLD.device), []
        for step in range(schedule.offsets.index(tokens)):
            total = total + self.contribution(actions_BLD[:, schedule.tokens_of(step)], schedule, step)
            if step + 1 < inputs:
                made.append(self.input(total, schedule, step + 1))
        return total, made

    def encode(
        self, features_BDHW: Tensor, schedule: ScaleSchedule, corrupt: Corrupt | None = None
    ) -> tuple[Tensor, Tensor]:
        """Residual quantization of the encoder's features, coarse to fine.

        Every grid takes the signs of what is left, averaged to its size. With ``corrupt``, other bits than these enter
        the sum, and the grids after them make up for it.

        Returns:
            int64 [B, L, bits] twice: the labels, and the bits that entered the sum.

        Raises:
            ValueError: if the features do not have the schedule's final size.
        """
        final = self.cells(schedule.grids[-1])
        if features_BDHW.shape[-2:] != final:
            raise ValueError(f"features of {list(features_BDHW.shape[-2:])} cells do not fit a final grid of {final}")
        rest, labels, drawn = features_BDHW.float(), [], []
        for step, grid in enumerate(schedule.grids):
            labels.append(self.to_tokens(binarize(resize_area(rest, self.cells(grid))).float()).long())
            drawn.append(labels[-1] if corrupt is None else corrupt(step, labels[-1]))
            rest = rest - self.contribution(drawn[-1], schedule, step)
        return torch.cat(labels, 1), torch.cat(drawn, 1)
