"""TokenFlow's language model in the longest way: the whole sequence at once, closing text included, no cache.

Written apart from the policy, with a dense mask as the paper's code has it; only weights are shared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.tokenflow import TokenFlow


def allowed(ids: Tensor, prompt: int, counts: list[int], pad: int) -> Tensor:
    """[B, S, S]: 1 where a row may look. Rows of [PAD] see nothing."""
    length = ids.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(ids), 1, 1)
    sees &= (ids != pad)[:, None, :]
    step = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    square = slice(prompt - 1, prompt - 1 + len(step))
    sees[:, square, square] = step[:, None] >= step[None, :]
    return sees


def whole_logits(policy: TokenFlow, ids: Tensor, prompt: int) -> Tensor:
    """Logits [B, S, vocabulary] of prompts, codes (with their offset) and closing text."""
    config, model = policy.config.transformer, policy.transformer.model
    schedule, length = policy.default_schedule, ids.shape[1]
    codes = ids[:, prompt : prompt + schedule.tokens] - config.image_token_start
    features, running = [], None
    for step in range(len(schedule) - 1):
        here = policy.tokenizer.quantize.entries(codes[:, schedule.tokens_of(step)])
        grid = here.transpose(1, 2).unflatten(2, schedule.grids[step])
        running = grid if running is None else running + grid
        running = F.interpolate(running, size=schedule.grids[step + 1], mode="bicubic")
        features.append(running.flatten(2).transpose(1, 2))
    x = model.embed_tokens(ids)
    x[:, prompt : prompt + schedule.tokens] = 0
    x[:, prompt : prompt + schedule.tokens - 1] = model.mm_projector(torch.cat(features, 1))
    levels = torch.zeros(length, dtype=torch.long)
    for step in range(1, len(schedule)):
        levels[prompt - 1 + schedule.offsets[step] : prompt - 1 + schedule.offsets[step + 1]] = step + 1
    x = x + model.lvl_embed(levels)
    x[:, prompt - 1 : prompt - 1 + schedule.tokens] += model.pos_1LC
    sees = allowed(ids, prompt, list(schedule.counts), config.pad_token_id)[:, None]
    bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    width = config.head_width
    angle = torch.outer(torch.arange(length).float(), config.rope_theta ** -(torch.arange(0, width, 2) / width))
    turn = torch.polar(torch.ones_like(angle), angle)
    for block in model.layers:
        x = _block(block, x, bias, turn, width)
    return policy.transformer.lm_head(model.norm(x))


def _block(block: torch.nn.Module, x: Tensor, bias: Tensor, turn: Tensor, width: int) -> Tensor:
    own = block.self_attn
    q, k, v = (p(x).unflatten(2, (-1, width)).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
    q = _turned(F.rms_norm(q, (width,), own.qknorm.query_norm.weight, 1e-6), turn)
    k = _turned(F.rms_norm(k, (width,), own.qknorm.key_norm.weight, 1e-6), turn)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    attended = (q @ k.transpose(2, 3) / width**0.5 + bias).softmax(-1) @ v
    x = x + block.input_layernorm(own.o_proj(attended.transpose(1, 2).flatten(2)))
    inner = F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
    return x + block.post_attention_layernorm(block.mlp.down_proj(inner))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding as a product of complex numbers; the second half of a head is the imaginary part."""
    pairs = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([pairs.real, pairs.imag], -1)
