"""Infinity's autoencoder, under upstream's key names: convolutions only, between pictures and features in bits."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from varl.models.autoencoder import Decoder, Encoder
from varl.models.infinity.config import TokenizerConfig

__all__ = ["Tokenizer"]


def _wrapped(module: nn.Module) -> nn.Module:
    """The module with every convolution and norm inside another module, which shows in upstream's keys."""
    for name, part in module.named_children():
        kind = {nn.Conv2d: "conv", nn.GroupNorm: "norm"}.get(type(part))
        module.add_module(name, nn.Sequential(OrderedDict({kind: part})) if kind else _wrapped(part))
    return module


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
        shape = (config.base_ch, config.ch_mult, config.num_res_blocks, config.codebook_dim, config.levels, False)
        self.encoder, self.decoder = _wrapped(Encoder(*shape)), _wrapped(Decoder(*shape))
        self.quantizer = _Quantizer(config.codebook_dim)
        self.quantize = self.quantizer  # upstream's files hold it under both names

    def features(self, images_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, bits, H / patch, W / patch], not normalised."""
        return self.encoder(images_B3HW)

    def picture(self, features_BDHW: Tensor) -> Tensor:
        """The inverse of ``features``, clamped to [-1, 1]."""
        return self.decoder(features_BDHW).clamp(-1, 1)
