"""The multi-scale residual quantizer of VAR-like tokenizers (Tian et al., arXiv 2404.02905, algorithms 1 and 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.schedule import ScaleSchedule

__all__ = ["MultiScaleQuantizer", "resize_area", "resize_up"]


def resize_area(x_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool a map to ``grid``; the map itself where it has that size already."""
    return x_BCHW if x_BCHW.shape[-2:] == grid else F.interpolate(x_BCHW, size=grid, mode="area")


def resize_up(x_BCHW: Tensor, grid: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Enlarge a map to ``grid``, by default bicubically (align_corners false, no antialiasing)."""
    return x_BCHW if x_BCHW.shape[-2:] == grid else F.interpolate(x_BCHW, size=grid, mode=mode)


class Phi(nn.Conv2d):
    """The convolution that smooths an enlarged grid: (1 - r) h + r conv(h)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, width, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class MultiScaleQuantizer(nn.Module):
    """One codebook for all scales; a picture's features are the sum of the enlarged, smoothed grids of codes.

    Args:
        codes: codebook size V.
        width: channels C of a code.
        schedule: the grids; every method takes maps of the final grid's size.
        ratio: r of ``Phi``.
        enlarge: how grids are enlarged, a mode of ``torch.nn.functional.interpolate``.
    """

    def __init__(
        self, codes: int, width: int, schedule: ScaleSchedule, ratio: float = 0.5, enlarge: str = "bicubic"
    ) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.schedule = schedule
        self.embedding = nn.Embedding(codes, width)
        self.phi = nn.ModuleList(Phi(width, ratio) for _ in schedule.grids)

    @property
    def final_grid(self) -> tuple[int, int]:
        return self.schedule.grids[-1]

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """Index of the nearest code for every cell: [B, H * W]."""
        z = z_BCHW.flatten(2).transpose(1, 2)
        table = self.embedding.weight
        return (table.square().sum(1) - 2 * z @ table.T).argmin(-1)

    def contribution(self, actions_BN: Tensor, step: int) -> Tensor:
        """What the codes of one step add to the features: [B, C, H_T, W_T]."""
        codes = self.embedding(actions_BN).transpose(1, 2).unflatten(2, self.schedule.grids[step])
        return self.phi[step](resize_up(codes, self.final_grid, self.enlarge))

    def encode(self, features_BCHW: Tensor) -> Tensor:
        """Greedy residual quantization of features of the final grid's size: actions [B, L]."""
        rest, actions = features_BCHW, []
        for step, grid in enumerate(self.schedule.grids):
            index = self.nearest(resize_area(rest, grid))
            rest = rest - self.contribution(index, step)
            actions.append(index)
        return torch.cat(actions, 1)

    def features(self, actions_BL: Tensor) -> Tensor:
        """Sum of the contributions of the steps that ``actions`` covers (all, or the first ones): [B, C, H_T, W_T]."""
        return self.accumulate(actions_BL)[0]

    def accumulate(self, actions_BL: Tensor, inputs_until: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Features of the steps covered by ``actions``, and the next-step input maps up to step ``inputs_until`` - 1.

        Input map i (i >= 1) is the sum of the first i contributions, averaged down to grid i; [B, C, h_i, w_i].
        """
        batch = actions_BL.shape[0]
        total = actions_BL.new_zeros((batch, self.embedding.embedding_dim, *self.final_grid), dtype=torch.float32)
        inputs: list[Tensor] = []
        for step in range(self.covered(actions_BL.shape[1])):
            total = total + self.contribution(actions_BL[:, self.schedule.tokens_of(step)], step)
            if step + 1 < inputs_until:
                inputs.append(resize_area(total, self.schedule.grids[step + 1]))
        return total, inputs

    def covered(self, tokens: int) -> int:
        """The number of whole steps in a sequence of ``tokens`` tokens.

        Raises:
            ValueError: if the sequence ends inside a step.
        """
        if tokens not in self.schedule.offsets[1:]:
            raise ValueError(f"{tokens} tokens end inside a step; steps end at {self.schedule.offsets[1:]}")
        return self.schedule.offsets.index(tokens)
