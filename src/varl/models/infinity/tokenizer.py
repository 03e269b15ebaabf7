"""Infinity's autoencoder, under upstream's key names: convolutions only, between pictures and features in bits."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.infinity.config import TokenizerConfig

__all__ = ["Tokenizer"]


class Conv(nn.Module):
    """A convolution that keeps the size; upstream wraps each one, which shows in the keys."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Norm(nn.Module):
    """Group normalisation with 32 groups, or 24 where 32 do not divide the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32 if width % 32 == 0 else 24, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Residual(nn.Module):
    """Two normalised convolutions around a skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), Conv(inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs), Conv(outputs, outputs)
        self.nin_shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Down(nn.Module):
    """Halve a map, padded by a zero at the right and at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(Residual(a, b) for a, b in pairwise(widths))
        self.downsample: Down | None = None
        self.upsample: Up | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        move = self.downsample or self.upsample
        return x if move is None else move(x)


class Middle(nn.Module):
    """Two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = Residual(width, width), Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, bits, H / patch, W / patch]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_ch, *(config.base_ch * mult for mult in config.ch_mult)]
        self.conv_in = Conv(3, widths[0])
        self.down = nn.ModuleList(Level(a, b, config.num_res_blocks) for a, b in pairwise(widths))
        for level, width in zip(self.down[: config.levels], widths[1:], strict=False):
            level.downsample = Down(width)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = Norm(widths[-1]), Conv(widths[-1], config.codebook_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, bits, h, w] -> [B, 3, h * patch, w * patch]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_ch * mult for mult in config.ch_mult]
        self.conv_in = Conv(config.codebook_dim, widths[-1])
        self.mid = Middle(widths[-1])
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(a, b, config.num_res_blocks + 1) for a, b in zip(inputs, widths, strict=True)
        )  # the finest first
        for i in range(1, config.levels + 1):
            self.up[i].upsample = Up(widths[i])
        self.norm_out, self.conv_out = Norm(widths[0]), Conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Powers(nn.Module):
    """A buffer of upstream's files, without a use here: what each bit would count for in an index."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))


class _Quantizer(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.lfq = _Powers(bits)


class Tokenizer(nn.Module):
    """Pictures in [-1, 1] to features and back; quantizing them is ``BitQuantizer``'s."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = _Quantizer(config.codebook_dim)
        self.quantize = self.quantizer  # upstream's files hold it under both names

    def features(self, images_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, bits, H / patch, W / patch], not normalised."""
        return self.encoder(images_B3HW)

    def picture(self, features_BDHW: Tensor) -> Tensor:
        """The inverse of ``features``, clamped to [-1, 1]."""
        return self.decoder(features_BDHW).clamp(-1, 1)
