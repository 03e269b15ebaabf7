"""TokenFlow's tokenizer: a semantic and a pixel encoder, the quantizer with two codebooks, and a decoder of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varl.models.tokenflow.config import TokenizerConfig
from varl.models.tokenflow.pixels import PixelDecoder, PixelEncoder
from varl.models.tokenflow.quantizer import DualQuantizer
from varl.models.tokenflow.vision import SemanticDecoder, SemanticEncoder

__all__ = ["Tokenizer"]

TEACHER_WIDTH = 512
"""Channels of the semantic features that the tokenizer learned to rebuild."""


def _task_layer(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


class Tokenizer(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to actions [B, L] and back."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        c = config
        self.schedule = c.schedule
        self.encoder = PixelEncoder(c.enc_ch, c.ch_mult, c.enc_res, c.z_channels)
        self.decoder = PixelDecoder(c.dec_ch, c.ch_mult, c.dec_res, c.z_channels)
        self.quant_conv = nn.Conv2d(c.z_channels, c.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.codebook_embed_dim, c.z_channels, 1)
        self.encoder_vqkd = SemanticEncoder(c.vit_width, c.vit_layers, c.vit_heads, c.stride, c.pos_grid)
        self.decoder_vqkd = SemanticDecoder(
            c.semantic_code_dim, c.vit_dec_width, c.vit_dec_depth, c.vit_dec_heads, c.pos_grid
        )
        self.encode_task_layer = _task_layer(c.vit_width, c.semantic_code_dim)
        self.decode_task_layer = _task_layer(c.vit_dec_width, TEACHER_WIDTH)
        self.quantize = DualQuantizer(c.codebook_size, c.semantic_code_dim, c.codebook_embed_dim, self.schedule)

    def features(self, images_B3HW: Tensor) -> Tensor:
        """What is quantized, [B, C, H_T, W_T], of pictures in [-1, 1]."""
        pixel = self.quant_conv(self.encoder(images_B3HW))
        semantic = self.encode_task_layer(self.encoder_vqkd(images_B3HW))
        return torch.cat([semantic.transpose(1, 2).unflatten(2, pixel.shape[2:]), pixel], 1)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Actions [B, L] of all steps."""
        images = images_B3HW.to(self.quant_conv.weight.dtype) * 2 - 1
        return self.quantize.encode(self.features(images))

    def picture(self, features_BCHW: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], around [-1, 1] and not clamped, of summed codes."""
        return self.decoder(self.post_quant_conv(self.quantize.split(features_BCHW)[1]))

    def semantics(self, features_BCHW: Tensor) -> Tensor:
        """The teacher's features [B, H_T * W_T, 512] of summed codes; pictures do not need them."""
        return self.decode_task_layer(self.decoder_vqkd(self.quantize.split(features_BCHW)[0]))

    def decode(self, actions_BL: Tensor) -> Tensor:
        """Pictures in [0, 1] from the actions of all steps, or of the first ones."""
        return (self.picture(self.quantize.features(actions_BL)).float() / 2 + 0.5).clamp(0, 1)
