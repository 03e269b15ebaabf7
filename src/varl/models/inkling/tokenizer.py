"""Inkling's tokenizer: a linear encoder, the multi-scale residual quantizer, and a small convolutional decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.quantizer import MultiScaleQuantizer, resize_area
from varl.schedule import ScaleSchedule

__all__ = ["LinearEncoder", "Tokenizer"]


def _patches(images_B3HW: Tensor, size: int) -> Tensor:
    """Non-overlapping patches as channels: [B, 3 * size^2, H / size, W / size]."""
    return F.pixel_unshuffle(images_B3HW, size)


def _principal(x_BCHW: Tensor, rank: int) -> Tensor:
    """The first principal directions of the channels, [rank, C], orthonormal; the mean is left in."""
    x = x_BCHW.transpose(0, 1).flatten(1).double()
    return torch.linalg.eigh(x @ x.T / x.shape[1])[1].flip(1)[:, :rank].T.float()


class LinearEncoder(nn.Module):
    """Principal components of patches at two sizes, stacked as channels of one map.

    ``coarse`` components describe patches of ``block`` cells a side and are repeated over their cells, so averaging the
    map down by ``block`` keeps them whole: the grid of that size can say what strokes a patch holds. ``fine`` ones
    describe what the coarse ones leave, cell by cell. Scaled so that squared distances between features are squared
    distances between pictures, as far as the components reach.
    """

    coarse: Tensor
    fine: Tensor

    def __init__(self, cell: int, block: int, coarse: int, fine: int) -> None:
        super().__init__()
        self.cell, self.block = cell, block
        self.register_buffer("coarse", torch.zeros(coarse, 3 * (block * cell) ** 2))
        self.register_buffer("fine", torch.zeros(fine, 3 * cell**2))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features [B, coarse + fine, H / cell, W / cell] of pictures in [0, 1]."""
        components, rest = self._split(images_B3HW - 0.5)
        fine = torch.einsum("dc,bchw->bdhw", self.fine, _patches(rest, self.cell))
        return torch.cat([F.interpolate(components, scale_factor=self.block, mode="nearest") / self.block, fine], 1)

    def _split(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        patches = _patches(x_B3HW, self.block * self.cell)
        components = torch.einsum("dc,bchw->bdhw", self.coarse, patches)
        rebuilt = torch.einsum("dc,bdhw->bchw", self.coarse, components)
        return components, F.pixel_shuffle(patches - rebuilt, self.block * self.cell)

    @torch.no_grad()
    def fit(self, images_B3HW: Tensor) -> None:
        """Set the components from sample pictures."""
        x = images_B3HW - 0.5
        self.coarse.copy_(_principal(_patches(x, self.block * self.cell), len(self.coarse)))
        self.fine.copy_(_principal(_patches(self._split(x)[1], self.cell), len(self.fine)))


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Tokenizer(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to actions [B, L] and back.

    The decoder also reads partial sums of the first grids (an early exit): it is trained on them.

    Args:
        schedule: square grids, the last a multiple of the one before; its stride is the encoder's cell.
        codes: size of the codebook.
        coarse, fine: components of the encoder; a code has ``coarse + fine`` channels.
        hidden: channels of the decoder.
    """

    def __init__(self, schedule: ScaleSchedule, codes: int, coarse: int, fine: int, hidden: int) -> None:
        super().__init__()
        sides = [height for height, _ in schedule.grids]
        self.encoder = LinearEncoder(schedule.stride, sides[-1] // sides[-2], coarse, fine)
        self.quantizer = MultiScaleQuantizer(codes, coarse + fine, schedule, enlarge="nearest")
        for phi in self.quantizer.phi:
            nn.init.dirac_(phi.weight)  # type: ignore[arg-type]
            nn.init.zeros_(phi.bias)  # type: ignore[arg-type]
        half, up = hidden // 2, schedule.stride // 2
        self.decoder = nn.Sequential(
            nn.Conv2d(coarse + fine, hidden, 3, padding=1),
            Residual(hidden),
            Residual(hidden),
            nn.Conv2d(hidden, 4 * half, 3, padding=1),
            nn.PixelShuffle(2),
            Residual(half),
            nn.SiLU(),
            nn.Conv2d(half, 3 * up**2, 3, padding=1),
            nn.PixelShuffle(up),
        )

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Actions [B, L] of all steps."""
        return self.quantizer.encode(self.encoder(images_B3HW))

    def picture(self, features_BCHW: Tensor) -> Tensor:
        """Decode features without clamping: [B, 3, H, W], near [0, 1]."""
        return self.decoder(features_BCHW) + 0.5

    def decode(self, actions_BL: Tensor) -> Tensor:
        """Pictures in [0, 1] from the actions of all steps, or of the first ones."""
        return self.picture(self.quantizer.features(actions_BL)).clamp(0, 1)

    @torch.no_grad()
    def fit(self, images_B3HW: Tensor, generator: torch.Generator, rounds: int = 12) -> None:
        """Set the encoder, then the codebook by k-means of the residuals, scale by scale.

        The last step gets three eighths of the codebook, and each one before half of what is left.
        """
        self.encoder.fit(images_B3HW)
        rest, table = self.encoder(images_B3HW), self.quantizer.embedding.weight
        steps = len(self.quantizer.schedule)
        bounds = [
            0,
            *(int(len(table) * 0.625 * 0.4 ** (steps - 2 - s)) for s in range(steps - 1)),
            len(table),
        ]
        for step, grid in enumerate(self.quantizer.schedule.grids):
            cells = resize_area(rest, grid).transpose(1, 3).flatten(0, 2)
            share = table[bounds[step] : bounds[step + 1]]
            share.copy_(_k_means(cells, len(share), rounds, generator))
            known = table[: bounds[step + 1]]
            z = resize_area(rest, grid).flatten(2).transpose(1, 2)
            index = torch.cat([(known.square().sum(1) - 2 * part @ known.T).argmin(-1) for part in z.split(64)])
            rest = rest - self.quantizer.contribution(index, step)


def _k_means(points: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Plain Lloyd iterations from random points: centres [k, C]. Empty clusters keep their centre."""
    points = points[torch.randperm(len(points), generator=generator)[: 64 * k]]
    centres = points[torch.randint(len(points), (k,), generator=generator)].clone()
    for _ in range(rounds):
        index = torch.cat([(centres.square().sum(1) - 2 * p @ centres.T).argmin(1) for p in points.split(4096)])
        count = torch.bincount(index, minlength=k)
        total = torch.zeros_like(centres).index_add_(0, index, points)
        centres = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), centres)
    return centres
