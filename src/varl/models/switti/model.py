"""Switti's transformer (Voronov et al., arXiv 2412.01819), with the module names of its published checkpoints.

Shapes: B rows, L tokens of a sequence, T tokens of a text, C width, D head width, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.blocks import Cache, Grids, KeyValueCache, ScaleAttention, WithinScale, run_block
from varl.models.coded import mask_tables
from varl.models.fields import bounded, grid_sides
from varl.models.layers import FeedForward, GatedFeedForward, Modulation, RMSNorm, spread
from varl.schedule import ScaleSchedule
from varl.transfer import sent

__all__ = ["Transformer", "TransformerConfig", "initialise"]

GRIDS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer; names are those of the published models' constructor, where it has them.

    Attributes:
        Cvae, V: channels and number of the tokenizer's codes.
        depth: blocks.
        embed_dim: width C; 0 stands for 64 * depth.
        num_heads: 0 stands for depth.
        mlp_ratio: hidden width of the feed-forward over C, without SwiGLU.
        norm_eps: of all norms.
        rope: rotate queries and keys by position; otherwise positions are embedded.
        rope_theta, rope_size: base of the frequencies, and the side that every grid is stretched to.
        use_swiglu_ffn: the gated feed-forward of hidden width 8 C / 3; otherwise GELU.
        use_ar: a grid sees all coarser ones; otherwise only itself.
        use_crop_cond: condition on how a picture was cut from a larger one.
        patch_nums: sides of the grids; the first is 1.
        context_dim: width of the text's tokens, of both encoders together.
        pooled_dim: width of the second encoder's summary.
        drop_rate, attn_drop_rate, drop_path_rate, cond_drop_rate: noise of pre-training. Taken and never applied: an
            action must be scored by the distribution it was drawn from.
    """

    Cvae: int = 32
    V: int = 4096
    depth: int = 30
    embed_dim: int = 0
    num_heads: int = 0
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    rope: bool = True
    rope_theta: float = 10000
    rope_size: float = 128
    use_swiglu_ffn: bool = True
    use_ar: bool = False
    use_crop_cond: bool = True
    patch_nums: tuple[int, ...] = GRIDS_512
    context_dim: int = 2048
    pooled_dim: int = 1280
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    cond_drop_rate: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        object.__setattr__(self, "embed_dim", self.embed_dim or 64 * self.depth)
        object.__setattr__(self, "num_heads", self.num_heads or self.depth)
        bounded(self, "Switti", depth=256, embed_dim=2**16, num_heads=1024, Cvae=4096, V=2**24)
        bounded(self, "Switti", context_dim=2**16, pooled_dim=2**16)
        grid_sides(self, "Switti", "patch_nums")
        if self.embed_dim % self.num_heads or (self.rope and self.embed_dim // self.num_heads % 4):
            raise ValueError(
                f"Switti's embed_dim {self.embed_dim} must be a multiple of its num_heads {self.num_heads}, and a "
                "head's width a multiple of 4 for rope"
            )
        if self.use_crop_cond and self.embed_dim % 8:
            raise ValueError(f"Switti's embed_dim {self.embed_dim} must be a multiple of 8 for the crop condition")
        if self.patch_nums[0] != 1:
            raise ValueError(f"Switti's first grid has side 1, not {self.patch_nums[0]}")


def _full_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def rotation_table(schedule: ScaleSchedule, width: int, theta: float, size: float) -> Tensor:
    """Unit complex numbers that rotate the pairs of a head's channels, complex64 [L, D / 2].

    The first half of the pairs turns with the column, the second with the row; every grid spans 0 to ``size``.
    """
    frequencies = 1 / theta ** (torch.arange(0, width, 4).float() / width)
    angles = []
    for height, _ in schedule.grids:
        turn = torch.arange(height).float()[:, None] * (frequencies * (size / max(height - 1, 1)))
        rows, columns = turn.repeat_interleave(height, 0), turn.repeat(height, 1)
        angles.append(torch.cat([columns, rows], 1))
    angle = torch.cat(angles)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BHLD: Tensor, table: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, times ``table`` [L, D / 2]; in fp32, then cast back."""
    pairs = torch.view_as_complex(x_BHLD.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x_BHLD.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.embed_dim, config.num_heads
        self.eps = config.norm_eps
        self.attend = ScaleAttention() if config.use_ar else WithinScale()
        self.to_qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, table: Tensor | None, grids: Grids, layer: int) -> Tensor:
        q, k, v = self.to_qkv(x_BLC).chunk(3, -1)
        # The norms of queries and keys reach over all heads.
        q, k = _full_norm(q, self.eps), _full_norm(k, self.eps)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        return self.proj(self.attend(q, k, v, grids, layer))


class CrossAttention(nn.Module):
    """Attention to the text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads, self.eps = config.embed_dim, config.num_heads, config.norm_eps
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(config.context_dim, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text_BTE: Tensor) -> Tensor:
        """Keys, normed, and values of a text: [B, 2, T, C]."""
        k, v = self.to_kv(text_BTE).chunk(2, -1)
        return torch.stack([_full_norm(k, self.eps), v], 1)

    def forward(self, x_BLC: Tensor, keys_values: Tensor, bias_BT: Tensor) -> Tensor:
        q = _full_norm(self.to_q(x_BLC), self.eps)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, keys_values[:, 0], keys_values[:, 1]))
        attended = F.scaled_dot_product_attention(q, k, v, bias_BT[:, None, None])
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each between two norms; the condition modulates two of them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, eps = config.embed_dim, config.norm_eps
        if config.use_crop_cond:
            self.crop_cond_scales = nn.Parameter(torch.zeros(1, width))
        self.attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        if config.use_swiglu_ffn:
            self.ffn: nn.Module = GatedFeedForward(width, int(8 * width / 3))
        else:
            self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        self.self_attention_norm1, self.self_attention_norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.cross_attention_norm1, self.cross_attention_norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attention_y_norm = RMSNorm(config.context_dim, eps)
        self.ada_lin = Modulation(width, 6)

    def read(self, text_BTE: Tensor) -> Tensor:
        """The text's keys and values for this block, [B, 2, T, C]."""
        return self.cross_attn.keys_values(self.attention_y_norm(text_BTE))

    def forward(
        self,
        x_BLC: Tensor,
        c_BC: Tensor,
        crop_BC: Tensor | None,
        text: Tensor,
        bias_BT: Tensor,
        read: bool,
        table: Tensor | None,
        grids: Grids,
        layer: int,
    ) -> Tensor:
        """``text`` is [B, T, E] and to be read, or the keys and values [B, 2, T, C] that reading gave before."""
        c = c_BC if crop_BC is None else c_BC + self.crop_cond_scales * crop_BC
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(c).unbind(2)
        x = self.self_attention_norm1(x_BLC) * (1 + scale1) + shift1
        x_BLC = x_BLC + gate1 * self.self_attention_norm2(self.attn(x, table, grids, layer))
        keys_values = self.read(text) if read else text
        x = self.cross_attn(self.cross_attention_norm1(x_BLC), keys_values, bias_BT)
        x_BLC = x_BLC + self.cross_attention_norm2(x)
        x = self.ffn_norm1(x_BLC) * (1 + scale2) + shift2
        return x_BLC + gate2 * self.ffn_norm2(self.ffn(x))


class CropEmbedding(nn.Module):
    """Fixed random Fourier features of whole numbers, [..., n] to [..., n * C / 4].

    Computed in the weight's own type and in this order of products: in bf16 the phases, up to thousands, lose all
    meaning, but they lose it as in the published pipeline, which runs in bf16.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        phase = values.to(self.weight.dtype).unsqueeze(-1) * self.weight * 2 * math.pi
        return torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)


class FinalNorm(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps, self.ada_lin = eps, Modulation(width, 2)

    def forward(self, x_BLC: Tensor, c_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(c_BC).unbind(2)
        return _full_norm(x_BLC, self.eps) * (1 + scale) + shift


class Transformer(nn.Module):
    """From a text and the sums of the grids drawn so far to what the head needs.

    Attributes:
        checkpointing: recompute the blocks in the backward pass.
    """

    undecayed = ("lvl_embed.weight", "pos_1LC")
    lora_targets: tuple[str, ...] = ("attn.to_qkv", "attn.proj", "cross_attn.to_q", "cross_attn.to_kv")
    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.schedule = config, ScaleSchedule.square(config.patch_nums)
        ffn = ("gate_proj", "up_proj", "down_proj") if config.use_swiglu_ffn else ("fc1", "fc2")
        self.lora_targets = self.lora_targets + tuple(f"ffn.{name}" for name in ffn)
        self.checkpointing = False
        self._tables: dict[torch.device, Tensor] = {}
        width = config.embed_dim
        self.word_embed = nn.Linear(config.Cvae, width)
        self.text_pooler = nn.Linear(config.pooled_dim, width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        if not config.rope:
            self.pos_1LC = nn.Parameter(torch.empty(1, self.schedule.tokens, width))
        self.lvl_embed = nn.Embedding(len(self.schedule), width)
        if config.use_crop_cond:
            self.crop_embed, self.crop_proj = CropEmbedding(width // 8), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        steps, mask = mask_tables(self.schedule, config.use_ar)
        self.register_buffer("lvl_1L", steps)
        self.register_buffer("attn_bias_for_masking", mask)
        self.head_nm = FinalNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.V)

    def new_cache(self) -> KeyValueCache | None:
        return KeyValueCache(len(self.blocks), self.schedule.tokens) if self.config.use_ar else None

    def prepare(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The keys and values of the text for all blocks, ``text`` [B, blocks, 2, T, C], where they are not there."""
        if "text" in condition:
            return {}
        embeds = condition["prompt_embeds"].to(self.word_embed.weight.dtype)
        return {"text": torch.stack([block.read(embeds) for block in self.blocks], 1)}  # type: ignore[operator]

    def rotations(self, span: slice, device: torch.device) -> Tensor | None:
        """The rotation of every token of ``span``; the table is made when first asked for."""
        c = self.config
        if not c.rope:
            return None
        if device not in self._tables:
            table = rotation_table(self.schedule, c.embed_dim // c.num_heads, c.rope_theta, c.rope_size)
            self._tables = {device: sent(table, device)}
        return self._tables[device][span]

    def embed(self, c_BC: Tensor, inputs: Sequence[Tensor], steps: range) -> Tensor:
        """The sequence that enters the blocks, [B, L, C]."""
        tokens = []
        if steps.start == 0:
            tokens.append(c_BC.unsqueeze(1) + self.pos_start)
        if inputs:
            maps = torch.cat([m.flatten(2) for m in inputs], 2).transpose(1, 2)
            tokens.append(self.word_embed(maps.to(c_BC.dtype)))
        span = self.schedule.span(steps)
        x = torch.cat(tokens, 1) + self.lvl_embed(self.lvl_1L[:, span])
        return x if self.config.rope else x + self.pos_1LC[:, span]

    def forward(
        self,
        condition: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        steps: range,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head needs for the tokens of ``steps``: [B, L, C].

        Args:
            condition: ``pooled`` [B, P], ``attn_bias`` [B, T] (0 or -inf), ``prompt_embeds`` [B, T, E] or what
                ``prepare`` made of it, and ``crop``, whole numbers [B, 4], if the model takes it.
            inputs: one map [B, Cvae, h, w] for each of ``steps`` but step 0, which has none.
            steps: consecutive; with ``use_ar`` they must start at 0 unless a cache holds all coarser steps.
            cache: read, and written at the positions of ``steps``.
        """
        dtype = self.word_embed.weight.dtype
        c = self.text_pooler(condition["pooled"].to(dtype))
        crop = self.crop_proj(self.crop_embed(condition["crop"])) if self.config.use_crop_cond else None
        x, bias, read = self.embed(c, inputs, steps), condition["attn_bias"].to(dtype), "text" not in condition
        text = condition["prompt_embeds"].to(dtype) if read else condition["text"]
        span = self.schedule.span(steps)
        grids = Grids([self.schedule.counts[s] for s in steps], span.start, cache)
        table = self.rotations(span, x.device)
        for layer, block in enumerate(self.blocks):
            of_block = text if read else text[:, layer]
            arguments = (x, c, crop, of_block, bias, read, table, grids, layer)
            x = run_block(self.checkpointing, block, *arguments)
        return self.head_nm(x, c)


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """Random weights: normal of variance 1 / (3 C), projections into the residual stream smaller with depth."""
    width, depth = model.config.embed_dim, model.config.depth
    std = math.sqrt(1 / (3 * width))
    spread(model, std)
    for name, parameter in model.named_parameters():
        if name in ("pos_start", "pos_1LC"):
            nn.init.normal_(parameter, std=std)
        elif name.endswith(("attn.proj.weight", "ffn.down_proj.weight", "ffn.fc2.weight")):
            parameter.div_(math.sqrt(2 * depth))
        elif name.endswith("ada_lin.1.weight"):
            parameter.mul_(0.5)
    model.head.weight.mul_(0.02)
