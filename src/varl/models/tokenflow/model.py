"""TokenFlow-T2I's language model: a Llama with post-norms that draws grid by grid (arXiv 2412.03069).

A sequence is the prompt, P positions padded on the left, and the grids' tokens. The prompt's last position is at the
same time the only token of step 0: what it predicts is the first code. So P - 1 positions of text are followed by the
L tokens of the schedule, and the token i of the schedule sits at position P - 1 + i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.blocks import Cache, Eager, KeyValueCache, attend_by_scale, run_block
from varl.models.layers import GatedFeedForward, RMSNorm, spread
from varl.models.tokenflow.config import TransformerConfig
from varl.schedule import ScaleSchedule
from varl.transfer import sent

__all__ = ["Transformer"]

QK_EPS = 1e-6
INIT_STD = 0.02


@dataclass(frozen=True)
class Layout:
    """Where the rows of one pass sit, and what they see.

    Attributes:
        start: position of the first row.
        text: rows of the prompt, the first of the pass; 0 if the cache holds the prompt.
        counts: tokens of the grids that follow, without step 0's if the prompt is in the pass.
        text_mask: bool [B, 1, text, text].
        keys: bool [B, 1, 1, positions], False for [PAD].
        cos, sin: rotary tables of the rows, [rows, head width].
    """

    start: int
    text: int
    counts: list[int]
    text_mask: Tensor | None
    keys: Tensor
    cos: Tensor
    sin: Tensor


class QKNorm(nn.Module):
    """Norms of queries and keys, over the width of a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(width, QK_EPS), RMSNorm(width, QK_EPS)

    def forward(self, q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(dtype), self.key_norm(k).to(dtype)


def _rotate(x: Tensor, layout: Layout) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * layout.cos + torch.cat([-high, low], -1) * layout.sin


class PromptAttention(Eager):
    """Causal over the prompt, by scale over the grids; [PAD] is seen by none but itself.

    Args:
        groups: adjacent heads of queries that share one of keys.
        rounding: round as upstream does, where the model is not fp32.
    """

    def __init__(self, groups: int, rounding: bool) -> None:
        super().__init__()
        self.groups, self.rounding = groups, rounding

    def forward(
        self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: Layout, cache: Cache | None, layer: int
    ) -> Tensor:
        """[B, L, H * D]."""
        k, v = (k_BHLD, v_BHLD) if cache is None else cache.write(layer, layout.start, k_BHLD, v_BHLD)
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        # Under autocast the rotary tables keep fp32, and nothing is rounded as in a model that was cast itself.
        attend = _attend_rounding if self.rounding and torch.finfo(q_BHLD.dtype).bits < 32 else _attend
        return attend(q_BHLD, k, v, layout).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with normed and rotated queries and keys."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c, self.width = config, config.head_width
        self.attend = PromptAttention(c.num_attention_heads // c.key_heads, c.upstream_rounding)
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.width, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.key_heads * self.width, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.key_heads * self.width, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.width, c.hidden_size, bias=False)
        self.qknorm = QKNorm(self.width)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None, layer: int) -> Tensor:
        heads = (-1, self.width)
        q, k, v = (
            projection(x).unflatten(2, heads).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.qknorm(q, k, v.dtype)
        q, k = _rotate(q, layout), _rotate(k, layout)
        return self.o_proj(self.attend(q, k, v, layout, cache, layer))


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    out, text = [], layout.text
    if text:
        out.append(F.scaled_dot_product_attention(q[:, :, :text], k[:, :, :text], v[:, :, :text], layout.text_mask))
    if layout.counts:
        out.append(attend_by_scale(q[:, :, text:], k, v, layout.counts, mask_B11K=layout.keys))
    return torch.cat(out, 2)


def _attend_rounding(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The same in upstream's order of rounding: scores in the model's dtype, softmax in fp32."""
    first, ends = layout.start + layout.text, []
    for count in layout.counts:
        first += count
        ends += [first] * count
    position = torch.arange(k.shape[2], device=q.device)
    sees = layout.keys & (position < torch.tensor(ends, device=q.device).view(-1, 1))
    if layout.text_mask is not None:
        sees = torch.cat([F.pad(layout.text_mask, (0, k.shape[2] - layout.text)), sees], 2)
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~sees, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


class Block(nn.Module):
    """Attention and feed-forward, each normalised *after* it, whatever the parameters' names say."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedFeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BLC: Tensor, layout: Layout, cache: Cache | None, layer: int) -> Tensor:
        x_BLC = x_BLC + self.input_layernorm(self.self_attn(x_BLC, layout, cache, layer))
        return x_BLC + self.post_attention_layernorm(self.mlp(x_BLC))


class Trunk(nn.Module):
    """The parameters that upstream keeps under ``model``, and the embedding of a sequence."""

    def __init__(self, config: TransformerConfig, schedule: ScaleSchedule, code_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.schedule = schedule
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.mm_projector = nn.Sequential(nn.Linear(code_width, width), nn.GELU(), nn.Linear(width, width))
        self.lvl_embed = nn.Embedding(len(schedule) + 1, width)
        self.pos_1LC = nn.Parameter(torch.zeros(schedule.tokens, width))

    def embed(self, prompt_BP: Tensor, inputs: list[Tensor], steps: range) -> Tensor:
        """Rows of the prompt, if ``steps`` begins with step 0, and of the grids: [B, rows, C].

        The levels count upstream's scales from 1: all text has 0, step 0 (a position of text) too, and step s >= 1 has
        s + 1; so row 1 of the level embedding serves nobody.
        """
        rows = []
        if steps.start == 0:
            text = self.embed_tokens(prompt_BP) + self.lvl_embed.weight[0]
            rows = [text[:, :-1], text[:, -1:] + self.pos_1LC[:1]]
        drawn = range(max(steps.start, 1), steps.stop)
        if drawn:
            # Contiguous, or in bf16 the projector's bias would be added to a product that is rounded already.
            maps = torch.cat([m.flatten(2) for m in inputs], 2).transpose(1, 2).contiguous()
            levels = torch.tensor([s + 1 for s in drawn for _ in range(self.schedule.counts[s])])
            entered = self.mm_projector(maps.to(self.lvl_embed.weight.dtype))
            rows.append(entered + self.lvl_embed(sent(levels, maps.device)) + self.pos_1LC[self.schedule.span(drawn)])
        return torch.cat(rows, 1)


class Transformer(nn.Module):
    """From prompts and the features of the grids drawn so far to what the head needs of the next grid's tokens.

    Args:
        config: the shape.
        schedule: the grids; the first is 1x1.
        code_width: channels of the tokenizer's features.
        codes: classes of a token; the head has more rows, those of text, which are stored and never computed.
    """

    checkpointing: bool = False
    undecayed = ("model.embed_tokens.weight", "model.lvl_embed.weight", "model.pos_1LC", "lm_head.weight")
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, config: TransformerConfig, schedule: ScaleSchedule, code_width: int, codes: int) -> None:
        super().__init__()
        self.config, self.schedule, self.codes = config, schedule, codes
        self.model = Trunk(config, schedule, code_width)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        spread(self, INIT_STD)
        nn.init.normal_(self.model.pos_1LC, std=INIT_STD)

    def new_cache(self, prompt: int) -> KeyValueCache:
        """For prompts of ``prompt`` positions; all of the schedule fits."""
        return KeyValueCache(self.config.num_hidden_layers, prompt - 1 + self.schedule.tokens)

    def forward(self, prompt_BP: Tensor, inputs: list[Tensor], steps: range, cache: Cache | None = None) -> Tensor:
        """Features of the tokens of ``steps``: [B, L, C].

        Args:
            prompt_BP: ids, padded on the left.
            inputs: one map [B, code_width, h, w] for each of ``steps`` but step 0, which has none.
            steps: consecutive; must start at 0, where the prompt is read, unless a cache holds all that comes before.
            cache: read, and written at the positions of the pass.
        """
        x = self.model.embed(prompt_BP, inputs, steps)
        layout = self._layout(prompt_BP, steps, x)
        for layer, block in enumerate(self.model.layers):
            x = run_block(self.checkpointing, block, x, layout, cache, layer)
        span = self.schedule.span(steps)
        return self.model.norm(x[:, x.shape[1] - (span.stop - span.start) :])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the image codes, [..., codes]."""
        codes = slice(self.config.image_token_start, self.config.image_token_start + self.codes)
        if type(self.lm_head) is not nn.Linear:
            # An adapter's own layer: it must be called, or the adapter would do nothing.
            return self.lm_head(hidden)[..., codes]
        return F.linear(hidden, self.lm_head.weight[codes])

    def _layout(self, prompt_BP: Tensor, steps: range, x: Tensor) -> Layout:
        prompt, with_text = prompt_BP.shape[1], steps.start == 0
        start = 0 if with_text else prompt - 1 + self.schedule.offsets[steps.start]
        known = prompt_BP != self.config.pad_token_id
        keys = F.pad(known, (0, start + x.shape[1] - prompt), value=True)[:, None, None]
        mask = None
        if with_text:
            # Rows of [PAD] mean nothing and nobody sees them; that they see themselves keeps them finite.
            eye = torch.eye(prompt, dtype=torch.bool, device=prompt_BP.device)
            mask = known[:, None, None].expand(-1, 1, prompt, -1).tril() | eye
        counts = [self.schedule.counts[s] for s in steps if s > 0]
        cos, sin = (table[start : start + x.shape[1]] for table in self._rotary(x))
        return Layout(start, prompt if with_text else 0, counts, mask, keys, cos, sin)

    def _rotary(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.device, like.dtype)
        if key not in self._tables:
            c = self.config
            power = torch.arange(0, c.head_width, 2, device=like.device).float() / c.head_width
            position = torch.arange(c.tokenizer_model_max_length, device=like.device).float()
            frequency = 1 / c.rope_theta**power
            if c.upstream_rounding:
                frequency = frequency.to(like.dtype).float()
            angle = torch.outer(position, frequency).repeat(1, 2)
            self._tables[key] = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
        return self._tables[key]
