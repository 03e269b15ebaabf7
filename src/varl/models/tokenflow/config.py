"""The shape of a TokenFlow-T2I: its language model, its tokenizer, and the published size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from varl.models.fields import MOST_SIDE, bounded, choose, fill
from varl.schedule import ScaleSchedule

__all__ = ["SIZES", "TokenFlowConfig", "TokenizerConfig", "TransformerConfig", "read_config"]

SIZES = ("7b",)
"""The published sizes; the defaults below are those of ``7b``, drawn at 256 pixels."""

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry"
)


@dataclass(frozen=True)
class TransformerConfig:
    """The language model; fields are named as upstream's.

    Attributes:
        vocab_size: text pieces, [PAD] and image codes.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the shape.
        num_key_value_heads: heads of keys and values, shared by groups of query heads; by default as many.
        rms_norm_eps: of the norms of width ``hidden_size`` (those of queries and keys have 1e-6).
        rope_theta: base of the rotary embedding.
        mm_projector_type: how features of drawn grids enter; only ``mlp2x_gelu``.
        mm_hidden_size: width of those features; by default what the tokenizer has, and no other will do.
        tokenizer_model_max_length: longest sequence.
        max_text_token_num: pieces of a prompt, <s> among them; longer ones are cut.
        pad_token_id, image_token_start: ids of [PAD] and of the first image code.
        img_open_ids: pieces of ``<img>``; by default those of the text tokenizer.
        img_close_ids: pieces of ``</img>``, which only supervised training needs; taken and not used.
        cfg: upstream's guidance, used by ``generate`` unless told otherwise.
        upstream_rounding: once cast to bf16, round where upstream's model does: the frequencies of the rotary embedding
            and the scores of attention. False keeps frequencies in fp32 and attention fused, which is faster. It
            changes nothing in fp32, nor under autocast, which is how runs compute in bf16.
    """

    vocab_size: int = 64769
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    mm_projector_type: str = "mlp2x_gelu"
    mm_hidden_size: int | None = None
    tokenizer_model_max_length: int = 2048
    max_text_token_num: int = 128
    pad_token_id: int = 32000
    image_token_start: int = 32001
    img_open_ids: tuple[int, ...] | None = None
    img_close_ids: tuple[int, ...] | None = None
    cfg: float = 7.5
    upstream_rounding: bool = True

    def __post_init__(self) -> None:
        for name in ("img_open_ids", "img_close_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(int(v) for v in value))
        if self.mm_projector_type != "mlp2x_gelu":
            raise ValueError(f"TokenFlow's mm_projector_type is mlp2x_gelu, not {self.mm_projector_type}")
        bounded(self, "TokenFlow", vocab_size=2**24, hidden_size=2**16, intermediate_size=2**18)
        bounded(self, "TokenFlow", num_hidden_layers=256, num_attention_heads=1024, key_heads=1024)
        bounded(self, "TokenFlow", tokenizer_model_max_length=2**24, max_text_token_num=2**20)
        if self.hidden_size % self.num_attention_heads or self.head_width % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of {self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.key_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.key_heads} heads of keys and values evenly"
            )

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer with two codebooks.

    Attributes:
        scales: sides of the grids; by default 1 to 16, or 1 to 14 without ``infer_interpolate``.
        pos_grid: side of the stored positional grids of the two vision transformers, interpolated to the final grid.
        codebook_size: codes; one index names an entry of both codebooks.
        codebook_embed_dim, semantic_code_dim: channels of the pixel and of the semantic codebook.
        ch_mult, enc_ch, enc_res, dec_ch, dec_res, z_channels: the pixel encoder and decoder; ``dec_ch`` and ``dec_res``
            are by default 256 and 4 with ``enhanced_decoder``, 128 and 2 without.
        vit_width, vit_layers, vit_heads: the semantic encoder.
        vit_dec_width, vit_dec_depth, vit_dec_heads: the semantic decoder.
        teacher: of the semantic encoder; only ``clipb_224`` draws.
        enhanced_decoder, infer_interpolate: upstream's flags, which set defaults of the above.
    """

    scales: tuple[int, ...] = ()
    pos_grid: int = 14
    codebook_size: int = 32768
    codebook_embed_dim: int = 8
    semantic_code_dim: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    enc_ch: int = 128
    enc_res: int = 2
    dec_ch: int = 0
    dec_res: int = 0
    z_channels: int = 256
    vit_width: int = 768
    vit_layers: int = 12
    vit_heads: int = 12
    vit_dec_width: int = 768
    vit_dec_depth: int = 3
    vit_dec_heads: int = 12
    teacher: str = "clipb_224"
    enhanced_decoder: bool = True
    infer_interpolate: bool = True

    def __post_init__(self) -> None:
        if self.teacher != "clipb_224":
            raise ValueError(f"only TokenFlow's tokenizer with the teacher clipb_224 draws, not {self.teacher}")
        sides = (1, 2, 4, 6, 8, 10, 12, 14) + ((16,) if self.infer_interpolate else ())
        object.__setattr__(self, "scales", tuple(int(s) for s in self.scales) or sides)
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "dec_ch", self.dec_ch or (256 if self.enhanced_decoder else 128))
        object.__setattr__(self, "dec_res", self.dec_res or (4 if self.enhanced_decoder else 2))
        bounded(self, "TokenFlow", scales=MOST_SIDE, pos_grid=MOST_SIDE, codebook_size=2**24, ch_mult=64)
        bounded(self, "TokenFlow", codebook_embed_dim=4096, semantic_code_dim=4096, z_channels=2**16)
        bounded(self, "TokenFlow", enc_ch=4096, dec_ch=4096, enc_res=64, dec_res=64)
        bounded(self, "TokenFlow", vit_width=2**16, vit_layers=256, vit_heads=1024)
        bounded(self, "TokenFlow", vit_dec_width=2**16, vit_dec_depth=256, vit_dec_heads=1024)
        if self.enc_ch % 32 or self.dec_ch % 32:
            raise ValueError(f"enc_ch {self.enc_ch} and dec_ch {self.dec_ch} must be multiples of 32")
        if self.scales[0] != 1:
            raise ValueError(f"TokenFlow's first scale is 1, read at the prompt's last piece; got {self.scales}")
        if not self.infer_interpolate and self.scales[-1] != self.pos_grid:
            raise ValueError(f"without infer_interpolate the last scale must be {self.pos_grid}, got {self.scales}")

    @property
    def stride(self) -> int:
        """Pixels a token of the final grid covers, a side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def code_width(self) -> int:
        """Channels of a code: semantic ones first, then those for pixels."""
        return self.semantic_code_dim + self.codebook_embed_dim

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.square(self.scales, self.stride)


@dataclass(frozen=True)
class TokenFlowConfig:
    """Both parts.

    Attributes:
        transformer, tokenizer: their shapes.
        negative_prompt: what guidance leads away from, as text; only read with a text tokenizer.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        lm, vq = self.transformer, self.tokenizer
        if lm.mm_hidden_size not in (None, vq.code_width):
            raise ValueError(f"mm_hidden_size is {lm.mm_hidden_size}, but codes have {vq.code_width} channels")
        if lm.image_token_start + vq.codebook_size > lm.vocab_size:
            raise ValueError(
                f"{vq.codebook_size} codes from id {lm.image_token_start} on do not fit a vocab_size of {lm.vocab_size}"
            )


def read_config(config: Mapping[str, Any] | None) -> TokenFlowConfig:
    """A shape from ``{"size": "7b"}``, ``{"transformer": {...}, "tokenizer": {...}}``, or both; none is ``7b``.

    Raises:
        ValueError: if a size or field is unknown, or fields do not go together.
    """
    given = dict(config or {})
    size = given.pop("size", SIZES[0])
    choose(SIZES, size, "TokenFlow")
    for part, kind in (("transformer", TransformerConfig), ("tokenizer", TokenizerConfig)):
        given[part] = fill(kind, given.get(part), f"TokenFlow's {part}")
    return fill(TokenFlowConfig, given, "TokenFlow")
