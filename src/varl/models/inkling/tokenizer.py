"""Inkling's tokenizer: a linear encoder, the multi-scale residual quantizer, and a small convolutional decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.quantizer import MultiScaleQuantizer, resize_area
from varl.schedule import ScaleSchedule

__all__ = ["LinearEncoder", "Tokenizer", "code_bounds"]


def _patches(images_B3HW: Tensor, size: int) -> Tensor:
    """Non-overlapping patches as channels: [B, 3 * size^2, H / size, W / size]."""
    return F.pixel_unshuffle(images_B3HW, size)


def _principal(x_BCHW: Tensor, rank: int) -> Tensor:
    """The first principal directions of the channels, [rank, C], orthonormal; the mean is left in."""
    x = x_BCHW.transpose(0, 1).flatten(1).double()
    return torch.linalg.eigh(x @ x.T / x.shape[1])[1].flip(1)[:, :rank].T.float()


class LinearEncoder(nn.Module):
    """Principal components of patches at two sizes.

    ``coarse`` components describe patches of ``block`` cells a side and are repeated over their cells, so averaging the
    map down by ``block`` keeps them whole: the grid of that size can say what strokes a patch holds. ``fine`` ones
    describe, cell by cell, what the coarse grids have missed. Scaled so that squared distances between features are
    squared distances between pictures, as far as the components reach.
    """

    coarse: Tensor
    fine: Tensor

    def __init__(self, cell: int, block: int, coarse: int, fine: int) -> None:
        super().__init__()
        self.cell, self.block = cell, block
        self.register_buffer("coarse", torch.zeros(coarse, 3 * (block * cell) ** 2))
        self.register_buffer("fine", torch.zeros(fine, 3 * cell**2))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Coarse features [B, coarse, H / cell, W / cell] of pictures in [0, 1]."""
        components = torch.einsum("dc,bchw->bdhw", self.coarse, _patches(images_B3HW - 0.5, self.block * self.cell))
        return F.interpolate(components, scale_factor=self.block, mode="nearest") / self.block

    def missed(self, images_B3HW: Tensor, coarse_BCHW: Tensor) -> Tensor:
        """What pictures have beyond coarse features, in patches of a cell: [B, 3 * cell^2, H / cell, W / cell]."""
        components = F.avg_pool2d(coarse_BCHW, self.block) * self.block
        rebuilt = torch.einsum("dc,bdhw->bchw", self.coarse, components)
        return _patches(images_B3HW - 0.5 - F.pixel_shuffle(rebuilt, self.block * self.cell), self.cell)

    def fine_features(self, missed_BCHW: Tensor) -> Tensor:
        """Fine features [B, fine, H / cell, W / cell] of what was missed."""
        return torch.einsum("dc,bchw->bdhw", self.fine, missed_BCHW)


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

    def target(self, images_B3HW: Tensor, total_BCHW: Tensor, step: int) -> Tensor:
        """What ``step`` is to add to the sum of the steps before it, at the final grid's size.

        The coarse grids share the coarse features; the last grid takes on what they missed, in the fine channels.
        """
        channels = len(self.encoder.coarse)
        if step < len(self.quantizer.schedule) - 1:
            rest = self.encoder(images_B3HW) - total_BCHW[:, :channels]
            return F.pad(rest, (0, 0, 0, 0, 0, len(self.encoder.fine)))
        missed = self.encoder.missed(images_B3HW, total_BCHW[:, :channels])
        return F.pad(self.encoder.fine_features(missed), (0, 0, 0, 0, channels, 0))

    def choose(self, images_B3HW: Tensor, total_BCHW: Tensor, step: int) -> Tensor:
        """The nearest codes for ``step``, given the sum of the steps before it: actions [B, tokens of the step]."""
        target = self.target(images_B3HW, total_BCHW, step)
        return self.quantizer.nearest(resize_area(target, self.quantizer.schedule.grids[step]))

    def empty(self, batch: int) -> Tensor:
        """The sum of no steps, [B, C, H_T, W_T]."""
        width = self.quantizer.embedding.embedding_dim
        return self.quantizer.embedding.weight.new_zeros(batch, width, *self.quantizer.final_grid)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Actions [B, L] of all steps."""
        total, actions = self.empty(len(images_B3HW)), []
        for step in range(len(self.quantizer.schedule)):
            actions.append(self.choose(images_B3HW, total, step))
            total = total + self.quantizer.contribution(actions[-1], step)
        return torch.cat(actions, 1)

    def picture(self, features_BCHW: Tensor) -> Tensor:
        """Decode features without clamping: [B, 3, H, W], near [0, 1]."""
        return self.decoder(features_BCHW) + 0.5

    def decode(self, actions_BL: Tensor) -> Tensor:
        """Pictures in [0, 1] from the actions of all steps, or of the first ones."""
        return self.picture(self.quantizer.features(actions_BL)).clamp(0, 1)

    @torch.no_grad()
    def fit(self, images_B3HW: Tensor, generator: torch.Generator, rounds: int = 12) -> None:
        """Set the encoder, and the codebook by k-means of what each step is to add, step by step.

        The last step gets a quarter of the codebook. The one before gets most of the rest: it says what is written.
        """
        encoder, table = self.encoder, self.quantizer.embedding.weight
        encoder.coarse.copy_(_principal(_patches(images_B3HW - 0.5, encoder.block * encoder.cell), len(encoder.coarse)))
        total, steps = self.empty(len(images_B3HW)), len(self.quantizer.schedule)
        bounds = code_bounds(len(table), steps)
        for step, grid in enumerate(self.quantizer.schedule.grids):
            if step == steps - 1:
                missed = encoder.missed(images_B3HW, total[:, : len(encoder.coarse)])
                encoder.fine.copy_(_principal(missed, len(encoder.fine)))
            cells = resize_area(self.target(images_B3HW, total, step), grid).permute(0, 2, 3, 1).flatten(0, 2)
            share = table[bounds[step] : bounds[step + 1]]
            share.copy_(_k_means(cells, len(share), rounds, generator))
            table[bounds[step + 1] :] = 1e3
            actions = torch.cat(
                [self.choose(x, t, step) for x, t in zip(images_B3HW.split(64), total.split(64), strict=True)]
            )
            total = total + self.quantizer.contribution(actions, step)


def code_bounds(codes: int, steps: int) -> list[int]:
    """Where the codes of each step begin, and where the last end: ``fit`` gives each step some of its own."""
    return [0, *(int(codes * 0.75 * 0.3 ** (steps - 2 - step)) for step in range(steps - 1)), codes]


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
