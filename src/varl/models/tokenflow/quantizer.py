"""TokenFlow's multi-scale quantizer: two codebooks, one for meaning and one for pixels, under one shared index."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.quantizer import ResidualQuantizer, nearest_code, resize_up
from varl.schedule import ScaleSchedule

__all__ = ["DualQuantizer"]

USAGE = 131072


class DualQuantizer(ResidualQuantizer):
    """A code is the entry of both codebooks at one index, each of length 1: semantic channels, then those for pixels.

    Args:
        codes: entries V of both codebooks.
        semantic, pixel: their channels; C is the sum.
        schedule: the grids.
    """

    codebook_used: Tensor

    def __init__(self, codes: int, semantic: int, pixel: int, schedule: ScaleSchedule) -> None:
        super().__init__(semantic + pixel, schedule)
        self.embedding_vqkd = nn.Embedding(codes, semantic)
        self.embedding_vqgan = nn.Embedding(codes, pixel)
        # Statistics of the tokenizer's training; nothing reads them, and checkpoints hold them.
        self.register_buffer("codebook_used", torch.zeros(USAGE))

    def _unit(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        return torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], -1)

    def split(self, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic channels, and those for pixels."""
        semantic, pixel = maps_BCHW.tensor_split([self.embedding_vqkd.embedding_dim], 1)
        return semantic, pixel

    def entries(self, actions_BN: Tensor) -> Tensor:
        return self._unit(self.embedding_vqkd(actions_BN), self.embedding_vqgan(actions_BN))

    def grid(self, actions_BN: Tensor, step: int) -> Tensor:
        """Codes of one step as a map [B, C, h, w]."""
        return self.entries(actions_BN).transpose(1, 2).unflatten(2, self.schedule.grids[step])

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """By the sum of both distances; see ``ResidualQuantizer``."""
        table = self._unit(self.embedding_vqkd.weight, self.embedding_vqgan.weight)
        semantic, pixel = self.split(z_BCHW)
        return nearest_code(self._unit(semantic.flatten(2).transpose(1, 2), pixel.flatten(2).transpose(1, 2)), table)

    def features(self, actions_BL: Tensor) -> Tensor:
        """See ``ResidualQuantizer``; summed from the first grid on, whose memory layout decides how decoders round."""
        steps = range(self.covered(actions_BL.shape[1]))
        first, *rest = (self.contribution(actions_BL[:, self.schedule.tokens_of(step)], step) for step in steps)
        return sum(rest, first)

    def inputs(self, actions_BL: Tensor, steps: int) -> list[Tensor]:
        """What steps 1 to ``steps`` - 1 read, as maps [B, C, h_s, w_s] of their own size.

        Unlike in ``accumulate``, the sum goes from grid to grid: enlarged to the next, it takes on that one's codes.
        """
        maps: list[Tensor] = []
        for step in range(1, steps):
            maps.append(self.follow(maps[-1] if maps else None, actions_BL[:, self.schedule.tokens_of(step - 1)], step))
        return maps

    def follow(self, before_BCHW: Tensor | None, actions_BN: Tensor, step: int) -> Tensor:
        """What ``step`` reads, from what the step before it read (step 0: nothing) and the codes drawn there."""
        drawn = self.grid(actions_BN, step - 1)
        return resize_up(drawn if before_BCHW is None else before_BCHW + drawn, self.schedule.grids[step])
