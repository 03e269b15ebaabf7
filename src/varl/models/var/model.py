"""VAR's transformer (Tian et al., arXiv 2404.02905), with the module names of its published checkpoints.

Shapes: B rows, L tokens, C width, H heads, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varl.models.blocks import Cache, Grids, KeyValueCache, run_block
from varl.models.coded import mask_tables
from varl.models.fields import bounded, grid_sides
from varl.models.layers import FeedForward, Modulation, SelfAttention, modulated, spread
from varl.schedule import ScaleSchedule

__all__ = ["Transformer", "TransformerConfig", "initialise"]

GRIDS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer; names are those of the published models' constructor.

    Attributes:
        num_classes: labels; one more stands for none.
        depth: blocks.
        embed_dim: width C; 0 stands for 64 * depth.
        num_heads: 0 stands for depth.
        mlp_ratio: hidden width of the feed-forward over C.
        norm_eps: of the layer norms.
        shared_aln: one modulation for all blocks, each with an offset of its own.
        attn_l2_norm: attend by cosine with a learned scale a head.
        patch_nums: sides of the grids.
        drop_rate, attn_drop_rate, drop_path_rate, cond_drop_rate: noise of pre-training. Taken and never applied: an
            action must be scored by the distribution it was drawn from.
    """

    num_classes: int = 1000
    depth: int = 16
    embed_dim: int = 0
    num_heads: int = 0
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    patch_nums: tuple[int, ...] = GRIDS_256
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    cond_drop_rate: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        object.__setattr__(self, "embed_dim", self.embed_dim or 64 * self.depth)
        object.__setattr__(self, "num_heads", self.num_heads or self.depth)
        bounded(self, "VAR", num_classes=2**20, depth=256, embed_dim=2**16, num_heads=1024)
        grid_sides(self, "VAR", "patch_nums")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"VAR's embed_dim {self.embed_dim} must be a multiple of its num_heads {self.num_heads}")


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.eps = config.embed_dim, config.norm_eps
        # Without the cosine, scores are a quarter of the usual ones.
        self.attn = SelfAttention(width, config.num_heads, config.attn_l2_norm, tau=4.0)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = Modulation(width, 6)

    def forward(self, x_BLC: Tensor, c: Tensor, grids: Grids, layer: int) -> Tensor:
        """``c`` is the condition [B, C]; with a shared modulation, what that makes of it, [B, 1, 6, C]."""
        chunks = self.ada_gss + c if hasattr(self, "ada_gss") else self.ada_lin(c)
        gate1, gate2, scale1, scale2, shift1, shift2 = chunks.unbind(2)
        x = modulated(x_BLC, scale1, shift1, self.eps)
        x_BLC = x_BLC + gate1 * self.attn(x, grids, layer)
        return x_BLC + gate2 * self.ffn(modulated(x_BLC, scale2, shift2, self.eps))


class FinalNorm(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.ada_lin = eps, Modulation(width, 2)

    def forward(self, x_BLC: Tensor, c_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(c_BC).unbind(2)
        return modulated(x_BLC, scale, shift, self.eps)


class Transformer(nn.Module):
    """From a label and the sums of the grids drawn so far to what the head needs.

    Args:
        config: the shape.
        codes: classes V of a token.
        code_width: channels of the tokenizer's features.

    Attributes:
        checkpointing: recompute the blocks in the backward pass.
    """

    undecayed = ("class_emb.weight", "lvl_embed.weight", "pos_1LC")
    lora_targets = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: TransformerConfig, codes: int, code_width: int) -> None:
        super().__init__()
        self.config, self.schedule = config, ScaleSchedule.square(config.patch_nums)
        self.checkpointing = False
        width = config.embed_dim
        self.word_embed = nn.Linear(code_width, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.schedule.counts[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.schedule.tokens, width))
        self.lvl_embed = nn.Embedding(len(self.schedule), width)
        if config.shared_aln:
            self.shared_ada_lin = Modulation(width, 6)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        steps, mask = mask_tables(self.schedule)
        self.register_buffer("lvl_1L", steps)
        self.register_buffer("attn_bias_for_masking", mask)
        self.head_nm = FinalNorm(width, config.norm_eps)
        self.head = nn.Linear(width, codes)

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(len(self.blocks), self.schedule.tokens)

    def prepare(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def embed(self, c_BC: Tensor, inputs: Sequence[Tensor], steps: range) -> Tensor:
        """The sequence that enters the blocks, [B, L, C], summed in fp32."""
        dtype, tokens = self.word_embed.weight.dtype, []
        if steps.start == 0:
            tokens.append(c_BC.float().unsqueeze(1) + self.pos_start.float())
        if inputs:
            maps = torch.cat([m.flatten(2) for m in inputs], 2).transpose(1, 2)
            tokens.append(self.word_embed(maps.to(dtype)).float())
        span = self.schedule.span(steps)
        level = self.lvl_embed(self.lvl_1L[:, span]).float()
        return (torch.cat(tokens, 1) + level + self.pos_1LC[:, span].float()).to(dtype)

    def forward(
        self,
        condition: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        steps: range,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head needs for the tokens of ``steps``: [B, L, C].

        Args:
            condition: ``label``, int64 [B].
            inputs: one map [B, code_width, h, w] for each of ``steps`` but step 0, which has none.
            steps: consecutive; must start at 0 unless a cache holds all coarser steps.
            cache: read, and written at the positions of ``steps``.
        """
        c = self.class_emb(condition["label"])
        x = self.embed(c, inputs, steps)
        modulation = self.shared_ada_lin(c) if self.config.shared_aln else c
        grids = Grids([self.schedule.counts[s] for s in steps], self.schedule.offsets[steps.start], cache)
        for layer, block in enumerate(self.blocks):
            x = run_block(self.checkpointing, block, x, modulation, grids, layer)
        return self.head_nm(x, c)


@torch.no_grad()
def initialise(model: Transformer, gate: float = 1e-5) -> None:
    """Random weights as upstream starts training from; ``gate`` scales what makes the blocks' gates."""
    width, depth = model.config.embed_dim, model.config.depth
    std = math.sqrt(1 / (3 * width))
    spread(model, std)
    nn.init.normal_(model.pos_start, std=std)
    nn.init.normal_(model.pos_1LC, std=std)
    model.head.weight.mul_(0.02)
    model.head_nm.ada_lin.weight.mul_(0.5)
    for block in model.blocks:
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.ffn.fc2):
            layer.weight.div_(math.sqrt(2 * depth))
        chunks = block.ada_gss[0, 0] if model.config.shared_aln else block.ada_lin.weight.unflatten(0, (6, -1))
        chunks[:2].mul_(gate)
        chunks[2:].mul_(0.5)
