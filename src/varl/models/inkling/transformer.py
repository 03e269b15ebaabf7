"""Inkling's next-scale transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.blocks import Cache, Grids, KeyValueCache, ScaleAttention, run_block
from varl.schedule import ScaleSchedule

__all__ = ["Transformer"]


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attend = ScaleAttention()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLC: Tensor, grids: Grids, layer: int) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BLC)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_BLC = x_BLC + self.out(self.attend(q, k, v, grids, layer))
        return x_BLC + self.down(F.gelu(self.up(self.norm2(x_BLC)), approximate="tanh"))


class Transformer(nn.Module):
    """From the condition and the sum of the grids drawn so far to the features of the next grid's tokens.

    Every cell of the final grid has an embedding that says which part of which letter belongs there; a token of a
    coarser grid gets the mean over its cells.

    Args:
        schedule: square grids.
        codes: classes of a token.
        code_width: channels of the tokenizer's features.
        cells: kinds of cells (letters' parts, blank, and null for guidance).
        width, depth, heads: of the transformer.
    """

    undecayed = ("cell.weight", "first", "position")

    def __init__(
        self,
        schedule: ScaleSchedule,
        codes: int,
        code_width: int,
        cells: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.schedule, self.width, self.heads = schedule, width, heads
        self.checkpointing = False
        self.first = nn.Parameter(torch.zeros(width))
        self.cell = nn.Embedding(cells, width)
        self.enter = nn.Linear(code_width, width)
        self.position = nn.Parameter(torch.zeros(schedule.tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes)
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=(1 / self.width) ** 0.5 if module is not self.cell else 0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.out, block.down):
                layer.weight.data.div_((2 * depth) ** 0.5)
        nn.init.normal_(self.position, std=0.1)
        nn.init.normal_(self.first, std=0.1)
        self.head.weight.data.mul_(0.1)

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(len(self.blocks), self.schedule.tokens)

    def condition_map(self, cells_BHW: Tensor, steps: range) -> Tensor:
        """The condition of the tokens of ``steps``: [B, L, C]."""
        finest = self.cell(cells_BHW).permute(0, 3, 1, 2)
        pooled = [F.adaptive_avg_pool2d(finest, self.schedule.grids[s]).flatten(2) for s in steps]
        return torch.cat(pooled, 2).transpose(1, 2)

    def forward(self, cells_BHW: Tensor, inputs: list[Tensor], steps: range, cache: Cache | None = None) -> Tensor:
        """Features of the tokens of ``steps``: [B, L, C].

        Args:
            cells_BHW: kinds of cells at the final grid's size.
            inputs: one map [B, code_width, h, w] for each of ``steps`` but step 0, which has none.
            steps: consecutive; must start at 0 unless a cache holds all coarser steps.
            cache: read, and written at the positions of ``steps``.
        """
        x = self.condition_map(cells_BHW, steps) + self.position[self.schedule.span(steps)]
        if steps.start == 0:
            x = torch.cat([x[:, :1] + self.first, x[:, 1:]], 1)
        if inputs:
            maps = torch.cat([m.flatten(2) for m in inputs], 2).transpose(1, 2)
            x = torch.cat([x[:, : x.shape[1] - maps.shape[1]], x[:, -maps.shape[1] :] + self.enter(maps)], 1)
        grids = Grids([self.schedule.counts[s] for s in steps], self.schedule.offsets[steps.start], cache)
        for layer, block in enumerate(self.blocks):
            x = run_block(self.checkpointing, block, x, grids, layer)
        return self.norm(x)
