"""Infinity's next-scale transformer, under upstream's key names.

B rows, L tokens, C width, T tokens of text, E channels of text. Weights may be bf16: norms, rotations, AdaLN's
modulation and the head are computed in fp32 all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.blocks import Cache, Grids, KeyValueCache, run_block
from varl.models.infinity.attention import CrossAttention, TextPool
from varl.models.infinity.config import TransformerConfig
from varl.models.infinity.rope import rotary_table
from varl.models.infinity.schedules import final_grid
from varl.models.layers import FeedForward, Modulation, SelfAttention, modulated, plain_norm, spread
from varl.schedule import ScaleSchedule
from varl.transfer import sent

__all__ = ["After", "Transformer"]

LEVELS = 15
After = Callable[[int, Tensor], Tensor]
"""(layer, output of its block) -> what goes on instead."""


class TextNorm(nn.Module):
    """Root-mean-square normalisation, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class Norm(nn.LayerNorm):
    """Layer normalisation, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class FullLinear(nn.Linear):
    """A linear layer that computes in fp32, whatever its weights are and whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class Block(nn.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward."""

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        width, self.eps, self.drop_path = config.embed_dim, config.norm_eps, drop_path
        self.sa = SelfAttention(width, config.num_heads, config.cos_attn, config.tau)
        self.ca = CrossAttention(config)
        self.ffn = FeedForward(width, config.ffn_hidden)
        self.ca_norm = Norm(width, config.norm_eps)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.ada_lin = Modulation(width, 6)
        gain = config.cross_attn_layer_scale
        self.ca_gamma = nn.Parameter(torch.full((width,), gain)) if gain >= 0 else None

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        memory: Tensor,
        mask: Tensor,
        rotary: Tensor,
        grids: Grids,
        layer: int,
    ) -> Tensor:
        """x [B, L, C]; condition [B, 1, 6, C] of the shared AdaLN, or the pooled text [B, C]."""
        shared = hasattr(self, "ada_gss")
        table = self.ada_gss.float() + condition.float() if shared else self.ada_lin(condition).float()
        gain1, gain2, scale1, scale2, shift1, shift2 = table.unbind(2)
        seen = modulated(x, scale1, shift1, self.eps)
        x = x + self._dropped(gain1 * self.sa(seen, grids, layer, rotary)).to(x.dtype)
        read = self.ca(self.ca_norm(x).to(x.dtype), memory, mask)
        x = x + (read if self.ca_gamma is None else read * self.ca_gamma)
        seen = modulated(x, scale2, shift2, self.eps)
        return x + self._dropped(gain2 * self.ffn(seen)).to(x.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop-path: in training, whole rows of a branch are left out."""
        if not self.training or self.drop_path == 0:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


class Chunk(nn.Module):
    """Blocks that upstream wraps together; only their names matter here."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class HeadNorm(nn.Module):
    """Normalisation before the head, modulated by the pooled text, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), FullLinear(width, 2 * width))

    def forward(self, x_BLC: Tensor, pooled_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(pooled_BC.float()).unsqueeze(1).chunk(2, -1)
        return plain_norm(x_BLC, self.eps) * (1 + scale) + shift


class Transformer(nn.Module):
    """From a text and the sums of the grids drawn so far to the features of the next grids' tokens.

    Args:
        bits: of a token.
        h_div_w: the aspect ratio that very short schedules are taken to belong to.

    Attributes:
        checkpointing: recompute the blocks in the backward pass.
    """

    undecayed = ("cfg_uncond", "lvl_embed.weight")

    def __init__(self, config: TransformerConfig, bits: int, h_div_w: float = 1.0) -> None:
        super().__init__()
        self.config, self.bits, self.h_div_w, self.checkpointing = config, bits, h_div_w, False
        width = config.embed_dim
        self.cfg_uncond = nn.Parameter(torch.zeros(config.text_maxlen, config.text_channels))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.text_norm = TextNorm(config.text_channels, config.norm_eps)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.lvl_embed = nn.Embedding(LEVELS, width)
        self.word_embed = nn.Linear(bits, width)
        if config.shared_aln:
            self.shared_ada_lin = Modulation(width, 6)
        self.head_nm = HeadNorm(width, config.norm_eps)
        last = FullLinear(width, 2 * bits)
        self.head = (
            last
            if config.head_depth == 1
            else nn.Sequential(FullLinear(width, width), nn.GELU(approximate="tanh"), last)
        )
        rates = [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]
        blocks = [Block(config, rate) for rate in rates]
        if config.block_chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            size = config.depth // config.block_chunks
            self.block_chunks = nn.ModuleList(Chunk(blocks[i : i + size]) for i in range(0, config.depth, size))
        self._tables: dict[tuple[object, ...], Tensor] = {}

    @property
    def layers(self) -> list[Block]:
        """All blocks, first to last."""
        if self.config.block_chunks == 1:
            return cast(list[Block], list(self.blocks))
        return [block for chunk in self.block_chunks for block in cast(Chunk, chunk).module]  # type: ignore[misc]

    @torch.no_grad()
    def initialise(self) -> None:
        """Upstream's random weights; nothing on the meta device."""
        if self.pos_start.is_meta:
            return
        config, width = self.config, self.config.embed_dim
        std = math.sqrt(1 / (3 * width))
        spread(self, std)
        self.pos_start.normal_(0, std)
        self.text_proj_for_sos.ca.mat_q.normal_(0, std)
        rows = torch.empty(self.cfg_uncond.shape, device="cpu")  # upstream's generator is the CPU's
        nn.init.trunc_normal_(rows, std=1.2, a=-2, b=2, generator=torch.Generator().manual_seed(0))
        self.cfg_uncond.copy_(rows / math.sqrt(config.text_channels))
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(0.02)
        cast(nn.Linear, self.head_nm.ada_lin[1]).weight.mul_(1e-3)
        for block in self.layers:
            for linear in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                linear.weight.div_(math.sqrt(2 * config.depth))
            if config.shared_aln:
                block.ada_gss.normal_(0, width**-0.5)
                block.ada_gss[:, :, :2].mul_(5e-6)
                block.ada_gss[:, :, 2:].mul_(1e-3)
            else:
                block.ada_lin.weight[: 2 * width].mul_(5e-6)
                block.ada_lin.weight[2 * width :].mul_(1e-3)

    def new_cache(self, tokens: int) -> KeyValueCache:
        """Room for the keys and values of a whole schedule."""
        return KeyValueCache(self.config.depth, tokens)

    def rotary(self, schedule: ScaleSchedule, steps: range) -> Tensor:
        """cos and sin for the tokens of ``steps``: fp32 [2, L, head width / 2]; kept for the next call."""
        device, grids = self.pos_start.device, schedule.grids
        key = (grids, device)
        if key not in self._tables:
            final = final_grid(grids, self.h_div_w)
            width, mode = self.config.embed_dim // self.config.num_heads, self.config.rope2d_normalized_by_hw
            self._tables[key] = rotary_table(grids, final, width, mode, device)
        return self._tables[key][:, schedule.span(steps)]

    def read(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the blocks need of texts.

        Args:
            features: ``text`` [B, T, E], padded; ``length`` [B]; ``dropped`` bool [B], rows that read the learned
                unconditional text of the same length instead.

        Returns:
            ``pooled`` [B, C], ``memory`` [B, T, C], ``mask`` bool [B, T].
        """
        text, length, dropped = features["text"], features["length"], features["dropped"]
        mask = torch.arange(text.shape[1], device=text.device) < length[:, None]
        text = torch.where(dropped[:, None, None], self.cfg_uncond[: text.shape[1]].to(text.dtype), text)
        text = self.text_norm(text).to(self.word_embed.weight.dtype)
        return {"pooled": self.text_proj_for_sos(text, mask), "memory": self.text_proj_for_ca(text), "mask": mask}

    def forward(
        self,
        passes: Mapping[str, Tensor],
        inputs: list[Tensor],
        schedule: ScaleSchedule,
        steps: range,
        cache: Cache | None = None,
        after: After | None = None,
    ) -> Tensor:
        """Features of the tokens of ``steps``, ready for the head: fp32 [B, L, C].

        Args:
            passes: as ``read`` returns.
            inputs: [B, n, bits] for each of ``steps`` but step 0, which has none.
            steps: consecutive; must start at 0 unless a cache holds all coarser steps.
            cache: read, and written at the positions of ``steps``.
            after: applied to every block's output.
        """
        pooled = passes["pooled"]
        parts = [(pooled[:, None] + self.pos_start)] if steps.start == 0 else []
        parts += [self.word_embed(torch.cat(inputs, 1).to(self.word_embed.weight.dtype))] if inputs else []
        x = torch.cat(parts, 1)
        grids = Grids([schedule.counts[s] for s in steps], schedule.offsets[steps.start], cache)
        repeats = sent(torch.tensor(grids.counts), x.device)
        levels = self.lvl_embed(torch.arange(steps.start, steps.stop, device=x.device))
        levels = levels.repeat_interleave(repeats, 0, output_size=x.shape[1])
        condition = self.shared_ada_lin(pooled) if self.config.shared_aln else pooled
        rest = (passes["memory"], passes["mask"], self.rotary(schedule, steps), grids)
        chunk = self.config.depth // self.config.block_chunks if self.config.block_chunks > 1 else 1
        for layer, block in enumerate(self.layers):
            if layer == 0 or (layer % chunk == 0 and not self.config.add_lvl_embeding_only_first_block):
                x = x + levels
            x = run_block(self.checkpointing, block, x, condition, *rest, layer)
            x = x if after is None else after(layer, x)
        return self.head_nm(x, pooled)
