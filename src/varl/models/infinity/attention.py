"""Infinity's attention to the text, and the pooling of a text into one vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.infinity.config import TransformerConfig

__all__ = ["CrossAttention", "TextPool"]


class Normalizing(nn.Module):
    """Holds what keys without a bias need: upstream keeps a row of zeros in its files."""

    zero_k_bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))


def attend_text(q: Tensor, k: Tensor, v: Tensor, mask_BT: Tensor, rounded: bool) -> Tensor:
    """Attention of [B, H, L, D] queries to padded texts; ``rounded`` as upstream's kernel rounds fp32."""
    dtype = q.dtype
    if rounded and dtype == torch.float32:
        q, k, v = q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BT[:, None, None])
    return out.bfloat16().to(dtype) if rounded else out


class CrossAttention(Normalizing):
    """A token reads the text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.embed_dim)
        width, self.heads, self.rounded = config.embed_dim, config.num_heads, config.bf16ca
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, memory_BTC: Tensor, mask_BT: Tensor) -> Tensor:
        q = self.mat_q(x_BLC).unflatten(2, (self.heads, -1)).transpose(1, 2)
        kv = self.mat_kv(memory_BTC) + torch.cat([self.zero_k_bias, self.v_bias])
        k, v = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend_text(q, k, v, mask_BT, self.rounded).transpose(1, 2).flatten(2))


class TextPool(nn.Module):
    """One vector of a text: attention of a learned query. Upstream nests it under ``ca``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.ca = _Pool(config)

    def forward(self, text_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        return self.ca(text_BTE, mask_BT)


class _Pool(Normalizing):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.embed_dim)
        width, self.heads, self.rounded = config.embed_dim, config.text_pool_heads, config.bf16ca
        self.mat_q = nn.Parameter(torch.zeros(1, self.heads, width // self.heads))
        self.mat_kv = nn.Linear(config.text_channels, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, text_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        kv = self.mat_kv(text_BTE) + torch.cat([self.zero_k_bias, self.v_bias])
        k, v = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.mat_q.unsqueeze(2).expand(len(k), -1, -1, -1).to(k.dtype)
        return self.proj(attend_text(q, k, v, mask_BT, self.rounded).flatten(1))
