"""The convolutional tokenizer of VAR and Switti: an autoencoder of stride 16 around the multi-scale quantizer.

Module names are those of the published checkpoints; the quantizer is that of Tian et al. (arXiv 2404.02905).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from varl.models.autoencoder import Decoder, Encoder
from varl.models.fields import MOST_GRIDS, bounded, grid_sides
from varl.models.quantizer import CodebookQuantizer, Phi
from varl.schedule import ScaleSchedule

__all__ = ["VQVAE", "Quantizer", "VQVAEConfig", "phi_of_steps"]


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
        bounded(self, "a tokenizer", vocab_size=2**24, z_channels=4096, ch=4096, ch_mult=64, num_res_blocks=64)
        bounded(self, "a tokenizer", quant_conv_ks=63)
        grid_sides(self, "a tokenizer", "v_patch_nums")
        for name in ("share_quant_resi", "default_qresi_counts"):
            if not 0 <= getattr(self, name) <= MOST_GRIDS:
                raise ValueError(f"a tokenizer's {name} must be 0 to {MOST_GRIDS}, got {getattr(self, name)}")
        if self.ch % 32:
            raise ValueError(f"a tokenizer's channels ch must be a multiple of 32, got {self.ch}")


def phi_of_steps(count: int, steps: int) -> list[int]:
    """Which of ``count`` shared convolutions each step uses: the one whose tick is nearest to step / (steps - 1).

    The ticks are built and compared in float64 exactly so: ties are decided by its rounding.
    """
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - step / max(steps - 1, 1)))) for step in range(steps)]


class Quantizer(CodebookQuantizer):
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
        c, halvings = config, len(config.ch_mult) - 1
        self.config, self.schedule = config, ScaleSchedule.square(c.v_patch_nums, 2**halvings)
        kernel, width = c.quant_conv_ks, c.z_channels
        self.encoder = Encoder(c.ch, c.ch_mult, c.num_res_blocks, width, halvings, attention=True)
        self.decoder = Decoder(c.ch, c.ch_mult, c.num_res_blocks, width, halvings, attention=True)
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
