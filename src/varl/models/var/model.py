"""VAR's transformer (Tian et al., arXiv 2404.02905), with the module names of its published checkpoints.

Shapes: B rows, L tokens, C width, H heads, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.blocks import Cache, KeyValueCache, attend_by_scale, run_block
from varl.models.coded import mask_tables
from varl.schedule import ScaleSchedule

__all__ = ["Transformer", "TransformerConfig", "initialise"]

GRIDS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer; names are those of the published models' constructor.

    Attributes:
        num_classes: labels; one more stands for none.
        depth: blocks.
        embed_dim: width C; by default 64 * depth.
        num_heads: by default depth.
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
    embed_dim: int | None = None
    num_heads: int | None = None
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
        if self.width % self.heads:
            raise ValueError(f"VAR's embed_dim {self.width} must be a multiple of its num_heads {self.heads}")

    @property
    def width(self) -> int:
        assert self.embed_dim is not None
        return self.embed_dim

    @property
    def heads(self) -> int:
        assert self.num_heads is not None
        return self.num_heads


def _norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without parameters, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class Modulation(nn.Sequential):
    """SiLU and a linear layer of a condition; ``parts`` chunks of the width."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    @property
    def weight(self) -> Tensor:
        """[parts * C, C]."""
        return cast(nn.Linear, self[1]).weight

    def forward(self, c_BC: Tensor) -> Tensor:
        return super().forward(c_BC).unflatten(-1, (1, self.parts, -1))


class Attention(nn.Module):
    """Self-attention of a grid over itself and all coarser ones."""

    zero_k_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.normalised = config.attn_l2_norm
        if self.normalised:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, counts: Sequence[int], cache: Cache | None, layer: int, start: int) -> Tensor:
        qkv = self.mat_qkv(x_BLC) + torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = 0.25 / math.sqrt(q.shape[-1])
        if self.normalised:
            factor = self.scale_mul_1H11.float().clamp_max(math.log(100)).exp()
            q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
            scale = 1.0
        if cache is not None:
            k, v = cache.write(layer, start, k, v)
        return self.proj(attend_by_scale(q, k, v, counts, scale).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.eps = config.width, config.norm_eps
        self.attn = Attention(config)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = Modulation(width, 6)

    def forward(
        self,
        x_BLC: Tensor,
        c: Tensor,
        counts: Sequence[int],
        cache: Cache | None,
        layer: int,
        start: int,
    ) -> Tensor:
        """``c`` is the condition [B, C]; with a shared modulation, what that makes of it, [B, 1, 6, C]."""
        chunks = self.ada_gss + c if hasattr(self, "ada_gss") else self.ada_lin(c)
        gate1, gate2, scale1, scale2, shift1, shift2 = chunks.unbind(2)
        x = (_norm(x_BLC, self.eps) * (1 + scale1) + shift1).to(x_BLC.dtype)
        x_BLC = x_BLC + gate1 * self.attn(x, counts, cache, layer, start)
        x = (_norm(x_BLC, self.eps) * (1 + scale2) + shift2).to(x_BLC.dtype)
        return x_BLC + gate2 * self.ffn(x)


class FinalNorm(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.ada_lin = eps, Modulation(width, 2)

    def forward(self, x_BLC: Tensor, c_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(c_BC).unbind(2)
        return (_norm(x_BLC, self.eps) * (1 + scale) + shift).to(x_BLC.dtype)


class Transformer(nn.Module):
    """From a label and the sums of the grids drawn so far to what the head needs.

    Args:
        config: the shape.
        codes: classes V of a token.
        code_width: channels of the tokenizer's features.

    Attributes:
        checkpointing: recompute the blocks in the backward pass.
    """

    lora_targets = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: TransformerConfig, codes: int, code_width: int) -> None:
        super().__init__()
        self.config, self.schedule = config, ScaleSchedule.square(config.patch_nums)
        self.checkpointing = False
        width = config.width
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
        counts, start = [self.schedule.counts[s] for s in steps], self.schedule.offsets[steps.start]
        for layer, block in enumerate(self.blocks):
            x = run_block(self.checkpointing, block, x, modulation, counts, cache, layer, start)
        return self.head_nm(x, c)


@torch.no_grad()
def initialise(model: Transformer, gate: float = 1e-5) -> None:
    """Random weights as upstream starts training from; ``gate`` scales what makes the blocks' gates."""
    width, depth = model.config.width, model.config.depth
    std = math.sqrt(1 / (3 * width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
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
