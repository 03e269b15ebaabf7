"""Infinity's two-dimensional rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["coordinates", "rotary_table"]

Grid = tuple[int, int]
BASE = 10000.0
IMAGE = 128
"""Side of the grid whose rotation images mode 1 resizes."""


def _angles(positions: Tensor, head_width: int) -> Tensor:
    """[N] positions along one axis -> [N, head_width / 4] angles."""
    half = head_width // 2
    theta = 1.0 / BASE ** (torch.arange(0, half, 2, device=positions.device).float() / half)
    return torch.outer(positions.float(), theta)


def coordinates(grid: Grid, final: Grid, mode: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Row and column positions of a grid's sides, ([h], [w]) fp32.

    Mode 2 measures them in cells of ``final``, rounded half to even in fp32; mode 0 in the grid's own cells.
    """
    axes = [torch.arange(side, device=device, dtype=torch.float32) for side in grid]
    if mode == 2:
        axes = [(axis * (last / side)).round() for axis, side, last in zip(axes, grid, final, strict=True)]
    return axes[0], axes[1]


def _rotations(rows: Tensor, columns: Tensor, head_width: int) -> Tensor:
    """cos and sin of every cell: [2, h, w, head_width / 2], the first half of the channels from the row."""
    by_row = _angles(rows, head_width)[:, None].expand(-1, len(columns), -1)
    by_column = _angles(columns, head_width)[None].expand(len(rows), -1, -1)
    angles = torch.cat([by_row, by_column], -1)
    return torch.stack([angles.cos(), angles.sin()])


def _resized(grid: Grid, final: Grid, head_width: int, device: torch.device | str) -> Tensor:
    """Mode 1: the images of a square grid, cropped to the shape of ``final`` and resized with corners aligned."""
    longer = max(final)
    rows, columns = (IMAGE if side == longer else int(IMAGE / longer * side) for side in final)
    images = _rotations(torch.arange(rows, device=device), torch.arange(columns, device=device), head_width)
    small = F.interpolate(images.permute(0, 3, 1, 2), size=grid, mode="bilinear", align_corners=True)
    return small.permute(0, 2, 3, 1)


def rotary_table(
    grids: tuple[Grid, ...], final: Grid, head_width: int, mode: int, device: torch.device | str = "cpu"
) -> Tensor:
    """cos and sin for the tokens of all grids: fp32 [2, L, head_width / 2]."""
    if mode == 1:
        parts = [_resized(grid, final, head_width, device) for grid in grids]
    else:
        parts = [_rotations(*coordinates(grid, final, mode, device), head_width) for grid in grids]
    return torch.cat([part.flatten(1, 2) for part in parts], 1)
