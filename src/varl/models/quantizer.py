"""The multi-scale residual quantizer of VAR-like tokenizers (Tian et al., arXiv 2404.02905, algorithms 1 and 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.schedule import ScaleSchedule

__all__ = [
    "CodebookQuantizer",
    "MultiScaleQuantizer",
    "Phi",
    "ResidualQuantizer",
    "nearest_code",
    "resize_area",
    "resize_up",
]


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


def nearest_code(z_BNC: Tensor, table_VC: Tensor) -> Tensor:
    """Index of the nearest code: [B, N]."""
    return (table_VC.square().sum(1) - 2 * z_BNC @ table_VC.T).argmin(-1)


class ResidualQuantizer(nn.Module):
    """A picture's features are the sum of the enlarged grids of codes; a code is one index for all scales.

    Subclasses hold the codes: ``entries``, ``nearest``, and what becomes of an enlarged grid, ``smooth``.

    Args:
        width: channels C of a code.
        schedule: the grids; every method takes maps of the final grid's size.
        enlarge: how grids are enlarged, a mode of ``torch.nn.functional.interpolate``.
    """

    def __init__(self, width: int, schedule: ScaleSchedule, enlarge: str = "bicubic") -> None:
        super().__init__()
        self.width, self.schedule, self.enlarge = width, schedule, enlarge

    def entries(self, actions_BN: Tensor) -> Tensor:
        """Codes [B, N, C]."""
        raise NotImplementedError

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """Index of the nearest code for every cell: [B, H * W]."""
        raise NotImplementedError

    def smooth(self, h_BCHW: Tensor, step: int) -> Tensor:
        """What becomes of the enlarged grid of ``step``, [B, C, H_T, W_T]."""
        return h_BCHW

    @property
    def final_grid(self) -> tuple[int, int]:
        return self.schedule.grids[-1]

    def contribution(self, actions_BN: Tensor, step: int) -> Tensor:
        """What the codes of one step add to the features: [B, C, H_T, W_T]."""
        return self.contribution_of(self.entries(actions_BN), step)

    def contribution_of(self, codes_BNC: Tensor, step: int) -> Tensor:
        """What code vectors, mixtures of the codebook's or not, add to the features: [B, C, H_T, W_T]."""
        grid = codes_BNC.transpose(1, 2).unflatten(2, self.schedule.grids[step])
        return self.smooth(resize_up(grid, self.final_grid, self.enlarge), step)

    def encode(self, features_BCHW: Tensor) -> Tensor:
        """Greedy residual quantization of features of the final grid's size: actions [B, L]."""
        rest, actions = features_BCHW, []
        for step, grid in enumerate(self.schedule.grids):
            index = self.nearest(resize_area(rest, grid))
            rest = rest - self.contribution(index, step)
            actions.append(index)
        return torch.cat(actions, 1)

    def empty(self, batch: int) -> Tensor:
        """The sum of no contributions, [B, C, H_T, W_T]."""
        return next(self.parameters()).new_zeros(batch, self.width, *self.final_grid)

    def features(self, actions_BL: Tensor) -> Tensor:
        """Sum of the contributions of the steps that ``actions`` covers (all, or the first ones): [B, C, H_T, W_T]."""
        return self.accumulate(actions_BL)[0]

    def accumulate(self, actions_BL: Tensor, inputs_until: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Features of the steps covered by ``actions``, and the next-step input maps up to step ``inputs_until`` - 1.

        Input map i (i >= 1) is the sum of the first i contributions, averaged down to grid i; [B, C, h_i, w_i].
        """
        total = self.empty(len(actions_BL))
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


class CodebookQuantizer(ResidualQuantizer):
    """One codebook for all scales.

    Args:
        codes: its size V.
        width, schedule, enlarge: as in ``ResidualQuantizer``.
        cosine: choose the code of the largest cosine rather than the nearest one.
    """

    def __init__(
        self, codes: int, width: int, schedule: ScaleSchedule, enlarge: str = "bicubic", cosine: bool = False
    ) -> None:
        super().__init__(width, schedule, enlarge)
        self.cosine = cosine
        self.embedding = nn.Embedding(codes, width)

    def entries(self, actions_BN: Tensor) -> Tensor:
        return self.embedding(actions_BN)

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        z, table = z_BCHW.flatten(2).transpose(1, 2), self.embedding.weight
        if self.cosine:
            return (F.normalize(z, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
        return nearest_code(z, table)


class MultiScaleQuantizer(CodebookQuantizer):
    """A quantizer with a ``Phi`` for every step.

    Args:
        codes, width, schedule, enlarge: as in ``CodebookQuantizer``.
        ratio: r of ``Phi``.
    """

    def __init__(
        self, codes: int, width: int, schedule: ScaleSchedule, ratio: float = 0.5, enlarge: str = "bicubic"
    ) -> None:
        super().__init__(codes, width, schedule, enlarge)
        self.phi = nn.ModuleList(Phi(width, ratio) for _ in schedule.grids)

    def smooth(self, h_BCHW: Tensor, step: int) -> Tensor:
        return self.phi[step](h_BCHW)
