"""The convolutional tokenizer of VAR and Switti: an autoencoder of stride 16 around the multi-scale quantizer.

Module names are those of the published checkpoints. The encoder and decoder are those of latent diffusion's VQ-GAN
(Esser et al., arXiv 2012.09841); the quantizer is that of Tian et al. (arXiv 2404.02905).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varl.models.quantizer import Phi, ResidualQuantizer
from varl.schedule import ScaleSchedule

__all__ = ["VQVAE", "Quantizer", "VQVAEConfig", "phi_of_steps"]

GROUPS, EPS = 32, 1e-6


@dataclass(frozen=True)
class VQVAEConfig:
    """The shape of a tokenizer; names are those of the published models' constructors.

    Attributes:
        vocab_size: codes V.
        z_channels: channels of a code.
        ch: channels at full resolution; ``ch_mult`` times as many at each coarser one.
        num_res_blocks: residual blocks a resolution; the decoder has one more.
        using_znorm: choose codes by cosine.
        quant_conv_ks: kernel of the convolutions around the quantizer.
        quant_resi: r of the smoothing convolutions, (1 - |r|) h + |r| conv(h).
        share_quant_resi: how many such convolutions all steps share; 0 gives each its own.
        default_qresi_counts: with ``share_quant_resi`` 0, another number of them than steps.
        v_patch_nums: sides of the grids.
        dropout, beta, test_mode: matter only where a tokenizer is trained, which is never here; taken and not used.
    """

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    using_znorm: bool = False
    quant_conv_ks: int = 3
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    default_qresi_counts: int = 0
    v_patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    dropout: float = 0.0
    beta: float = 0.25
    test_mode: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_patch_nums", tuple(self.v_patch_nums))
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        if self.ch % GROUPS:
            raise ValueError(f"a tokenizer's channels ch must be a multiple of {GROUPS}, got {self.ch}")


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, EPS)


class Residual(nn.Module):
    """Norm, SiLU and a 3x3 convolution, twice, around a skip connection."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """Single-head attention of all cells to all cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj_out(attended.reshape(x.shape))


class Downsample(nn.Module):
    """Half the size: a column right and a row below of zeros, and a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbours and a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the change of resolution after them.

    Args:
        width, out: channels in and out.
        blocks: how many.
        attention: whether each is followed by attention, as at the coarsest resolution.
        change: the module after them, by its name.
    """

    def __init__(self, width: int, out: int, blocks: int, attention: bool, **change: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(out) for _ in range(blocks if attention else 0))
        self.change = tuple(change.values())
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for module in self.change:
            x = module(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Residual(width, width), PixelAttention(width), Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to features [B, z_channels, H / 16, W / 16]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            change = {"downsample": Downsample(width)} if i < last else {}
            before = widths[i - 1] if i else config.ch
            self.down.append(Level(before, width, config.num_res_blocks, i == last, **change))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] to pictures [B, 3, 16 h, 16 w], around [-1, 1]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            change = {"upsample": Upsample(width)} if i > 0 else {}
            self.up.append(Level(widths[min(i + 1, last)], width, config.num_res_blocks + 1, i == last, **change))
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def phi_of_steps(count: int, steps: int) -> list[int]:
    """Which of ``count`` shared convolutions each step uses: the one whose tick is nearest to step / (steps - 1).

    The ticks are built and compared in float64 exactly so: ties are decided by its rounding.
    """
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - step / max(steps - 1, 1)))) for step in range(steps)]


class Quantizer(ResidualQuantizer):
    """The quantizer with a few smoothing convolutions that steps share, under the names of the checkpoints."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: VQVAEConfig, schedule: ScaleSchedule) -> None:
        super().__init__(config.vocab_size, config.z_channels, schedule, cosine=config.using_znorm)
        shared, ratio = config.share_quant_resi, abs(config.quant_resi)
        count = shared or config.default_qresi_counts or len(schedule)
        phis = [Phi(config.z_channels, ratio) if ratio >= 1e-6 else nn.Identity() for _ in range(count)]
        self.phis = tuple(phis)
        self.chosen = phi_of_steps(count, len(schedule))
        self.quant_resi: nn.Module
        if shared == 1:
            self.quant_resi = nn.ModuleDict({"qresi": phis[0]})
        elif shared > 1:
            self.quant_resi = nn.ModuleDict({"qresi_ls": nn.ModuleList(phis)})
        else:
            self.quant_resi = nn.ModuleList(phis)
        # Statistics of use, kept because the checkpoints have them.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(schedule), config.vocab_size))

    def smooth(self, h_BCHW: Tensor, step: int) -> Tensor:
        return self.phis[self.chosen[step]](h_BCHW)


class VQVAE(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to actions [B, L] and back; H and W are 16 times the final grid's sides."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        stride = 2 ** (len(config.ch_mult) - 1)
        self.config, self.schedule = config, ScaleSchedule.square(config.v_patch_nums, stride)
        kernel, width = config.quant_conv_ks, config.z_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config, self.schedule)
        self.quant_conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)

    def features(self, images_B3HW: Tensor) -> Tensor:
        """What is quantized, [B, C, H_T, W_T]."""
        return self.quant_conv(self.encoder(images_B3HW.to(self.quant_conv.weight.dtype) * 2 - 1))

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Actions [B, L] of all steps."""
        return self.quantize.encode(self.features(images_B3HW))

    def picture(self, features_BCHW: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] of summed contributions."""
        return (self.decoder(self.post_quant_conv(features_BCHW)).clamp(-1, 1) + 1) / 2

    def decode(self, actions_BL: Tensor) -> Tensor:
        """Pictures in [0, 1] from the actions of all steps, or of the first ones."""
        return self.picture(self.quantize.features(actions_BL))
