"""Infinity's networks once more, in float64 and plainly from their state dicts: for what no vectors at hand cover."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.infinity import Infinity
from varl.models.infinity.schedules import final_grid
from varl.schedule import ScaleSchedule


def rotation(policy: Infinity, schedule: ScaleSchedule) -> tuple[Tensor, Tensor]:
    """cos and sin, [L, D / 2] each, token by token."""
    config = policy.config.transformer
    head, mode = config.embed_dim // config.num_heads, config.rope2d_normalized_by_hw
    theta = torch.tensor([10000.0 ** (-2 * j / (head / 2)) for j in range(head // 4)]).double()
    big_h, big_w = final_grid(schedule.grids)
    crop = (128, int(128 / big_h * big_w)) if big_h >= big_w else (int(128 / big_w * big_h), 128)

    def at(y: float, x: float) -> Tensor:
        angles = torch.cat([y * theta, x * theta])
        return torch.stack([angles.cos(), angles.sin()])

    def between(y: float, x: float) -> Tensor:
        y0, x0 = int(y), int(x)
        y1, x1, dy, dx = min(y0 + 1, crop[0] - 1), min(x0 + 1, crop[1] - 1), y - y0, x - x0
        upper = (1 - dx) * at(y0, x0) + dx * at(y0, x1)
        return (1 - dy) * upper + dy * ((1 - dx) * at(y1, x0) + dx * at(y1, x1))

    rows = []
    for h, w in schedule.grids:
        for y in range(h):
            for x in range(w):
                if mode == 0:
                    rows.append(at(y, x))
                elif mode == 1:
                    rows.append(between(y * (crop[0] - 1) / max(h - 1, 1), x * (crop[1] - 1) / max(w - 1, 1)))
                else:
                    rows.append(at(round(y * big_h / h), round(x * big_w / w)))
    cos, sin = torch.stack(rows, 1)
    return cos, sin


def reference_logits(policy: Infinity, text_TE: Tensor, maps_ND: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Teacher-forced logits [L, bits, 2] of one row; ``maps_ND`` are the inputs of all tokens but the first."""
    config, state = policy.config.transformer, policy.transformer.state_dict()
    w = {key: value.double() for key, value in state.items()}
    width, heads = config.embed_dim, config.num_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()).double())

    def attend(q: Tensor, k: Tensor, v: Tensor, n: int, scale: float, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.view(len(x), n, -1).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) * scale
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=config.norm_eps)

    text = text_TE.double()
    text = text / (text.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w["text_norm.weight"]
    pool, n = "text_proj_for_sos.ca", config.text_channels // 128
    k, v = linear(text, f"{pool}.mat_kv").chunk(2, -1)
    pooled = attend(w[f"{pool}.mat_q"].flatten(1), k, v + w[f"{pool}.v_bias"], n, (width / n) ** -0.5)
    pooled = linear(pooled, f"{pool}.proj")
    memory = linear(F.gelu(linear(text, "text_proj_for_ca.0"), approximate="tanh"), "text_proj_for_ca.2")

    level = torch.tensor(schedule.step_of_token())
    x = torch.cat([pooled + w["pos_start"][0], linear(maps_ND.double(), "word_embed")])
    mask = level[:, None] >= level[None]
    cos, sin = rotation(policy, schedule)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.view(len(x), heads, -1)[..., 0::2], x.view(len(x), heads, -1)[..., 1::2]
        c, s = cos[:, None], sin[:, None]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(1)

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.view(len(x), heads, -1), dim=-1).flatten(1)

    chunk = config.depth // config.block_chunks
    for layer in range(config.depth):
        name = f"block_chunks.{layer // chunk}.module.{layer % chunk}"
        name = f"blocks.{layer}" if config.block_chunks == 1 else name
        first = layer == 0 or config.block_chunks == 1 or layer % chunk == 0
        if layer == 0 or (first and not config.add_lvl_embeding_only_first_block):
            x = x + w["lvl_embed.weight"][level]
        if config.shared_aln:
            six = w[f"{name}.ada_gss"].flatten() + linear(F.silu(pooled), "shared_ada_lin.1")
        else:
            six = linear(F.silu(pooled), f"{name}.ada_lin.1")
        g1, g2, s1, s2, b1, b2 = six.view(6, width)
        q, k, v = linear(norm(x) * (1 + s1) + b1, f"{name}.sa.mat_qkv").chunk(3, -1)
        q, v = q + w[f"{name}.sa.q_bias"], v + w[f"{name}.sa.v_bias"]
        if config.cos_attn:
            gain = w[f"{name}.sa.scale_mul_1H11"].flatten().clamp(max=math.log(100)).exp()
            q, k, scale = unit(q) * gain.repeat_interleave(width // heads), unit(k), 1.0
        else:
            scale = (width / heads) ** -0.5 / config.tau
        x = x + g1 * linear(attend(rotate(q), rotate(k), v, heads, scale, mask), f"{name}.sa.proj")
        read = norm(x) * w[f"{name}.ca_norm.weight"] + w[f"{name}.ca_norm.bias"]
        k, v = linear(memory, f"{name}.ca.mat_kv").chunk(2, -1)
        q, scale = linear(read, f"{name}.ca.mat_q"), (width / heads) ** -0.5
        read = linear(attend(q, k, v + w[f"{name}.ca.v_bias"], heads, scale), f"{name}.ca.proj")
        x = x + read * w.get(f"{name}.ca_gamma", torch.ones(()))
        hidden = F.gelu(linear(norm(x) * (1 + s2) + b2, f"{name}.ffn.fc1"), approximate="tanh")
        x = x + g2 * linear(hidden, f"{name}.ffn.fc2")
    scale_, shift = linear(F.silu(pooled), "head_nm.ada_lin.1").chunk(2, -1)
    x = norm(x) * (1 + scale_) + shift
    if config.head_depth == 2:
        x = linear(F.gelu(linear(x, "head.0"), approximate="tanh"), "head.2")
    else:
        x = linear(x, "head")
    return x.unflatten(-1, (-1, 2))


def reference_autoencoder(policy: Infinity, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, bits, h, w] of pictures in [-1, 1], and the pictures that they decode to."""
    config, module = policy.config.tokenizer, policy.tokenizer
    assert module is not None
    w = {key: value.double() for key, value in module.state_dict().items()}

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], **options)

    def act(x: Tensor, name: str) -> Tensor:
        groups = 32 if x.shape[1] % 32 == 0 else 24
        x = F.group_norm(x, groups, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], eps=1e-6)
        return x * x.sigmoid()

    def residual(x: Tensor, name: str) -> Tensor:
        h = conv(act(x, f"{name}.norm1"), f"{name}.conv1", padding=1)
        h = conv(act(h, f"{name}.norm2"), f"{name}.conv2", padding=1)
        return h + (conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.conv.weight" in w else x)

    def middle(x: Tensor, name: str) -> Tensor:
        return residual(residual(x, f"{name}.mid.block_1"), f"{name}.mid.block_2")

    x, levels = conv(images.double(), "encoder.conv_in", padding=1), len(config.ch_mult)
    for i in range(levels):
        for j in range(config.num_res_blocks):
            x = residual(x, f"encoder.down.{i}.block.{j}")
        if 2**i < config.patch_size:
            x = conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{i}.downsample.conv", stride=2)
    features = conv(act(middle(x, "encoder"), "encoder.norm_out"), "encoder.conv_out", padding=1)
    x = middle(conv(features, "decoder.conv_in", padding=1), "decoder")
    for i in reversed(range(levels)):
        for j in range(config.num_res_blocks + 1):
            x = residual(x, f"decoder.up.{i}.block.{j}")
        if i >= 1 and 2 ** (i - 1) < config.patch_size:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(x, f"decoder.up.{i}.upsample.conv", padding=1)
    picture = conv(act(x, "decoder.norm_out"), "decoder.conv_out", padding=1)
    return features, picture.clamp(-1, 1)
