"""Layers that the transformers of several families have in common, under the key names of their checkpoints.

Shapes: B rows, L tokens, C width, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.blocks import Grids, ScaleAttention

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "Modulation",
    "RMSNorm",
    "SelfAttention",
    "modulated",
    "plain_norm",
    "rotate",
    "spread",
]


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, without parameters, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The plain norm, scaled and shifted by a condition (AdaLN), in the type of ``x``."""
    return (plain_norm(x, eps) * (1 + scale) + shift).to(x.dtype)


class RMSNorm(nn.Module):
    """Scaled to unit root mean square in fp32, cast back, then multiplied by the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        return (exact * (exact.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class Modulation(nn.Sequential):
    """SiLU and a linear layer of a condition [B, C]: [B, 1, parts, C]."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    @property
    def weight(self) -> Tensor:
        """[parts * C, C]."""
        return cast(nn.Linear, self[1]).weight

    def forward(self, c_BC: Tensor) -> Tensor:
        return super().forward(c_BC).unflatten(-1, (1, self.parts, -1))


class FeedForward(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GatedFeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x_BHLD: Tensor, table_2LP: Tensor) -> Tensor:
    """Rotate neighbouring channels (2i, 2i + 1) as pairs, by cos and sin [2, L, D / 2]."""
    cos, sin = table_2LP
    a, b = x_BHLD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class SelfAttention(nn.Module):
    """A token sees its own grid and all coarser ones. Queries and keys are made unit vectors, and rotated, in fp32.

    Args:
        width, heads: C and H.
        cosine: unit queries and keys, with a learned temperature a head.
        tau: divides the scores otherwise, beside the root of the head's width.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, cosine: bool, tau: float) -> None:
        super().__init__()
        self.heads, self.cosine = heads, cosine
        self.attend = ScaleAttention(1.0 if cosine else 1 / math.sqrt(width // heads) / tau)
        if cosine:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        # Keys have no bias; the checkpoints keep a row of zeros in its place.
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, grids: Grids, layer: int, rotary_2LP: Tensor | None = None) -> Tensor:
        """[B, L, C]."""
        qkv = self.mat_qkv(x_BLC) + torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = q.float(), k.float()
        if self.cosine:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.float().clamp(max=math.log(100)).exp()
            k = F.normalize(k, dim=-1)
        if rotary_2LP is not None:
            q, k = rotate(q, rotary_2LP), rotate(k, rotary_2LP)
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.proj(self.attend(q, k, v, grids, layer))


@torch.no_grad()
def spread(module: nn.Module, std: float) -> None:
    """Normal weights of linear layers and embeddings, no biases: what the families' random starts begin with."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
