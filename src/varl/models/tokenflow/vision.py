"""The two vision transformers of TokenFlow's tokenizer: CLIP's visual tower, and a decoder of meaning as in BEiT."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SemanticDecoder", "SemanticEncoder"]

CLIP_EPS, BEIT_EPS = 1e-5, 1e-6


def _positions(stored_NC: Tensor, side: int) -> Tensor:
    """Positional embeddings [1 + side^2, C] from those of a stored grid, the class token's untouched.

    The factor is a tenth of a cell too large on purpose: it sets where upstream's weights were trained to be read.
    """
    stored = round((len(stored_NC) - 1) ** 0.5)
    if side == stored:
        return stored_NC
    grid = stored_NC[1:].T.unflatten(1, (1, stored, stored)).transpose(0, 1)
    factor = (side + 0.1) / stored
    wide = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([stored_NC[:1], wide[0].flatten(1).T])


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, CLIP_EPS), nn.LayerNorm(width, CLIP_EPS)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x_BNC: Tensor) -> Tensor:
        h = self.ln_1(x_BNC)
        x_BNC = x_BNC + self.attn(h, h, h, need_weights=False)[0]
        return x_BNC + self.mlp(self.ln_2(x_BNC))


class ClipBlocks(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ClipBlock(width, heads) for _ in range(layers)))

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.resblocks(x_BNC)


class SemanticEncoder(nn.Module):
    """CLIP's visual tower on pictures [B, 3, H, W] in [-1, 1], which are not standardised: [B, cells, C].

    Args:
        width, layers, heads: the shape.
        patch: pixels a side of a cell.
        stored: side of the stored positional grid.
    """

    def __init__(self, width: int, layers: int, heads: int, patch: int, stored: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(1 + stored**2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, CLIP_EPS), nn.LayerNorm(width, CLIP_EPS)
        self.transformer = ClipBlocks(width, layers, heads)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x = self.conv1(images_B3HW)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + _positions(self.positional_embedding, side))
        return self.ln_post(self.transformer(x)[:, 1:])


class BeitAttention(nn.Module):
    """Attention whose keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BNC, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))


class BeitBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = BeitAttention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width, BEIT_EPS), nn.LayerNorm(width, BEIT_EPS)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), fc2=nn.Linear(4 * width, width))
        )

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BNC = x_BNC + self.attn(self.norm1(x_BNC))
        return x_BNC + self.mlp(self.norm2(x_BNC))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return self.proj(maps_BCHW).flatten(2).transpose(1, 2)


class SemanticDecoder(nn.Module):
    """Semantic channels of summed codes, [B, channels, h, w], to features [B, h * w, C]."""

    def __init__(self, channels: int, width: int, depth: int, heads: int, stored: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + stored**2, width))
        self.blocks = nn.Sequential(*(BeitBlock(width, heads) for _ in range(depth)))
        self.fc_norm = nn.LayerNorm(width, BEIT_EPS)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        x = self.patch_embed(maps_BCHW)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + _positions(self.pos_embed[0], maps_BCHW.shape[-1])
        return self.fc_norm(self.blocks(x)[:, 1:])
