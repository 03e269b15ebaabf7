"""The shape of an Infinity: its fields are named as upstream's constructors name them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from varl.models.fields import MOST_GRIDS, MOST_SIDE, bounded, choose, fill
from varl.models.infinity.schedules import RESOLUTIONS, grids
from varl.schedule import ScaleSchedule

__all__ = ["SIZES", "InfinityConfig", "TokenizerConfig", "TransformerConfig", "read_config"]


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer.

    Attributes:
        embed_dim, depth, num_heads, block_chunks, mlp_ratio: the trunk; 1 chunk is upstream's un-chunked layout.
        text_channels, text_maxlen: of the text encoder's features, and of the learned unconditional text.
        shared_aln: one AdaLN for all blocks, plus a table in each; otherwise each block has its own.
        cos_attn: unit queries and keys with a learned temperature a head; otherwise divided by ``tau`` and the root of
            the head's width.
        head_depth: 1 or 2 linear layers in the head.
        add_lvl_embeding_only_first_block: add the scale's embedding once; otherwise before every chunk.
        rope2d_normalized_by_hw: 0 a grid's own coordinates, 1 resized images, 2 coordinates in the largest grid.
        cross_attn_layer_scale: initial value of a learned gain on cross-attention; negative for none.
        norm_eps: of all norms.
        drop_path_rate: of the last block, in training mode; linear from 0 at the first.
        cond_drop_rate: how often training drops a text; ``training.drop_text`` is given it by its caller.
        bf16ca: round the inputs and results of both cross-attentions to bfloat16, as upstream's kernel does.
    """

    embed_dim: int = 2048
    depth: int = 32
    num_heads: int = 16
    block_chunks: int = 8
    mlp_ratio: float = 4.0
    text_channels: int = 2048
    text_maxlen: int = 512
    shared_aln: bool = True
    cos_attn: bool = True
    tau: float = 1.0
    head_depth: int = 1
    add_lvl_embeding_only_first_block: int = 1
    rope2d_normalized_by_hw: int = 2
    cross_attn_layer_scale: float = -1.0
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    cond_drop_rate: float = 0.1
    bf16ca: bool = False

    def __post_init__(self) -> None:
        bounded(self, "Infinity", depth=256, embed_dim=2**16, num_heads=1024, block_chunks=256)
        bounded(self, "Infinity", text_channels=2**16, text_maxlen=2**16)
        if not 0 < self.mlp_ratio <= 64:
            raise ValueError(f"Infinity's mlp_ratio must be above 0 and at most 64, got {self.mlp_ratio}")
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 4:
            raise ValueError(f"embed_dim {self.embed_dim} must be {self.num_heads} heads of a multiple of 4 channels")
        if self.depth % self.block_chunks:
            raise ValueError(f"depth {self.depth} must be a multiple of block_chunks {self.block_chunks}")
        if self.text_channels % self.pool_width or self.embed_dim % self.text_pool_heads:
            raise ValueError(f"text_channels {self.text_channels} gives no whole heads for embed_dim {self.embed_dim}")
        if self.ffn_hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} times embed_dim {self.embed_dim} rounds to no 256 channels")
        if self.head_depth not in (1, 2):
            raise ValueError(f"head_depth must be 1 or 2, got {self.head_depth}")
        if self.rope2d_normalized_by_hw not in (0, 1, 2):
            raise ValueError(f"rope2d_normalized_by_hw must be 0, 1 or 2, got {self.rope2d_normalized_by_hw}")

    @property
    def pool_width(self) -> int:
        """Channels of text that one head of the text pool stands for."""
        return 128 if self.embed_dim <= 4096 else 64

    @property
    def text_pool_heads(self) -> int:
        return self.text_channels // self.pool_width

    @property
    def ffn_hidden(self) -> int:
        """Rounded to a multiple of 256, halves to the even one."""
        return round(self.embed_dim * self.mlp_ratio / 256) * 256


@dataclass(frozen=True)
class TokenizerConfig:
    """The autoencoder.

    Attributes:
        codebook_dim: bits of a cell.
        base_ch, ch_mult, num_res_blocks: channels of the levels, and residual blocks of an encoder's level.
        patch_size: pixels a side of a cell, a power of two.
    """

    codebook_dim: int = 32
    base_ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    patch_size: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        bounded(self, "Infinity", codebook_dim=64, base_ch=4096, ch_mult=64, num_res_blocks=64, patch_size=2**16)
        if self.patch_size & (self.patch_size - 1) or self.levels >= len(self.ch_mult):
            raise ValueError(f"patch_size {self.patch_size} must be a power of two below 2^{len(self.ch_mult)}")
        for width in {self.base_ch, *(self.base_ch * mult for mult in self.ch_mult)}:
            if width % 32 and width % 24:
                raise ValueError(f"the tokenizer's widths must be multiples of 32 or 24, got {width}")

    @property
    def levels(self) -> int:
        """How often the encoder halves a picture."""
        return self.patch_size.bit_length() - 1


@dataclass(frozen=True)
class InfinityConfig:
    """An Infinity.

    Attributes:
        transformer, tokenizer: the two networks.
        apply_spatial_patchify: a token holds two by two of the tokenizer's cells.
        pn, h_div_w: resolution and height / width of the default schedule.
        scale_schedule: grids (height, width) of another default schedule.
        cfg_list: guidance of each scale (1 is off), as the ramp of ``Sampling.guidance`` 1.
        tau_list: divides each scale's logits; part of the policy's distribution, in sampling and scoring alike.
    """

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    apply_spatial_patchify: bool = False
    pn: str = "1M"
    h_div_w: float = 1.0
    scale_schedule: tuple[tuple[int, int], ...] | None = None
    cfg_list: tuple[float, ...] | None = None
    tau_list: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.scale_schedule or (1,)) <= MOST_GRIDS or any(
            not 1 <= side <= MOST_SIDE for grid in self.scale_schedule or () for side in grid
        ):
            raise ValueError(f"Infinity's scale_schedule has 1 to {MOST_GRIDS} grids of sides from 1 to {MOST_SIDE}")
        if not 0 < self.h_div_w < 1e6:
            raise ValueError(f"h_div_w is a positive height / width, got {self.h_div_w}")
        if self.pn not in RESOLUTIONS:
            raise ValueError(f"pn must be one of {', '.join(RESOLUTIONS)}, got {reprlib.repr(self.pn)}")
        if self.tau_list is not None and not all(tau > 0 for tau in self.tau_list):
            raise ValueError(f"tau_list must be positive, got {reprlib.repr(self.tau_list)}")

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return self.tokenizer.codebook_dim * (4 if self.apply_spatial_patchify else 1)

    @property
    def stride(self) -> int:
        """Pixels a side of a token of the final grid."""
        return self.tokenizer.patch_size * (2 if self.apply_spatial_patchify else 1)

    @property
    def schedule(self) -> ScaleSchedule:
        """The default schedule."""
        return ScaleSchedule(self.scale_schedule or grids(self.pn, self.h_div_w), self.stride)


def _trunk(depth: int, width: int, heads: int, chunks: int) -> dict[str, Any]:
    return {"depth": depth, "embed_dim": width, "num_heads": heads, "block_chunks": chunks}


SIZES: dict[str, dict[str, Any]] = {
    "layer12": _trunk(12, 768, 8, 4),
    "layer16": _trunk(16, 1152, 12, 4),
    "layer24": _trunk(24, 1536, 16, 4),
    "layer32": _trunk(32, 2080, 20, 4),
    "layer40": _trunk(40, 2688, 24, 4),
    "layer48": _trunk(48, 3360, 28, 4),
    "2b": _trunk(32, 2048, 16, 8) | {"vae_type": 32},
    "8b": _trunk(40, 3584, 28, 8) | {"vae_type": 14, "apply_spatial_patchify": True},
}
"""Upstream's sizes; the tokenizer is the one that its scripts pair with them."""
SIZES |= {"125M": SIZES["layer12"] | {"pn": "0.06M"}, "1B": SIZES["layer24"]}
SIZES |= {"8b_512": SIZES["8b"] | {"pn": "0.25M"}}
SIZES |= {f"infinity_{size}": SIZES[size] for size in ("2b", "8b")}

ONLY = {
    "swiglu": False,
    "rms_norm": False,
    "head_aln": True,
    "nm0": False,
    "use_bit_label": 1,
    "rope2d_each_sa_layer": 1,
    "schedule_mode": "dynamic",
    "mid_attention": False,
}
"""Upstream's arguments that all its models set alike: other values are refused."""
PASSED_OVER = {
    *("fused_norm", "customized_flash_attn", "use_flex_attn", "pad_to_multiplier", "inference_mode"),
    *("norm", "other", "note"),
}
"""Upstream's arguments that change speed and memory there but no result, and remarks that descriptions carry."""
DERIVED = {"V_head", "head_dim", "text_pool_heads", "ffn_hidden", "codebook_size"}
"""Numbers that follow from the others; where given, they must agree."""


def read_config(config: Mapping[str, Any] | None) -> InfinityConfig:
    """A configuration from a plain mapping.

    Args:
        config: a ``size`` of ``SIZES`` and/or fields of the dataclasses above, flat or under ``transformer`` and
            ``tokenizer``; also upstream's ``vae_type``, the bits of a cell of one of its tokenizers.

    Raises:
        ValueError: if a field is unknown or its value impossible.
    """
    given = dict(config or {})
    size = given.pop("size", None)
    if size is not None:
        size = choose(SIZES, size, "Infinity")
    for part in ("transformer", "tokenizer"):
        inner = given.pop(part, None) or {}
        if not isinstance(inner, Mapping):
            raise ValueError(f"Infinity's {part} must be a mapping of its fields, not {reprlib.repr(inner)}")
        given |= inner
    merged = SIZES.get(size or "", {}) | given
    names = {kind: {f.name for f in fields(kind)} for kind in (TransformerConfig, TokenizerConfig, InfinityConfig)}
    own = names[InfinityConfig] - {"transformer", "tokenizer"}
    settings = names[TransformerConfig] | names[TokenizerConfig] | own | {"vae_type", "d_vae"}
    unknown = sorted(merged.keys() - settings - set(ONLY) - PASSED_OVER - DERIVED, key=str)
    if unknown:
        fitting = ", ".join(sorted(settings | {"size", "transformer", "tokenizer"}))
        raise ValueError(f"Infinity has no setting {reprlib.repr(unknown[0])}; there are {fitting}")
    for name, value in ONLY.items():
        if name in merged and merged[name] != value:
            raise ValueError(
                f"Infinity with {name} = {reprlib.repr(merged[name])} is not supported, only with {value!r}"
            )
    values = _tokenizer_of(merged) | merged
    parts = {
        part: fill(kind, {k: v for k, v in values.items() if k in names[kind]}, f"Infinity's {part}")
        for part, kind in (("transformer", TransformerConfig), ("tokenizer", TokenizerConfig))
    }
    made = fill(InfinityConfig, parts | {k: _fixed(k, v) for k, v in values.items() if k in own}, "Infinity")
    _check_derived(made, merged)
    return made


def _tokenizer_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer that upstream pairs with ``vae_type`` (or with ``d_vae``, the bits of a token)."""
    shape = {"patch_size": 8, "ch_mult": (1, 2, 4, 4)} if given.get("apply_spatial_patchify") else {}
    bits = given.get("d_vae")
    for name in ("d_vae", "vae_type"):
        if not isinstance(given.get(name) or 0, int):
            raise ValueError(f"Infinity's {name} must be a whole number of bits, got {reprlib.repr(given[name])}")
    if bits is not None and given.get("apply_spatial_patchify"):
        bits //= 4
    bits = given.get("vae_type") or bits
    return shape if bits is None else shape | {"codebook_dim": bits}


def _fixed(name: str, value: Any) -> Any:
    lists = ("scale_schedule", "cfg_list", "tau_list")
    if name in lists and isinstance(value, str):
        return value  # as a command line gives it, which ``fill`` reads
    if name in lists and value is not None and not isinstance(value, Sequence):
        raise ValueError(f"Infinity's {name} must be a list, got {reprlib.repr(value)}")
    if name == "scale_schedule" and value is not None:
        if not all(isinstance(grid, Sequence) and len(grid) in (2, 3) for grid in value):
            raise ValueError(f"Infinity's scale_schedule holds grids (height, width), got {reprlib.repr(value)}")
        if any(len(grid) == 3 and grid[0] != 1 for grid in value):
            raise ValueError(
                f"Infinity draws pictures: the time of every grid (t, h, w) must be 1, got {reprlib.repr(value)}"
            )
        return tuple((grid[-2], grid[-1]) for grid in value)
    if name in ("cfg_list", "tau_list") and value is not None:
        return tuple(value)
    return bool(value) if name == "apply_spatial_patchify" else value


def _check_derived(made: InfinityConfig, given: Mapping[str, Any]) -> None:
    transformer = made.transformer
    derived = {
        "d_vae": made.bits,
        "V_head": 2 * made.bits,
        "head_dim": transformer.embed_dim // transformer.num_heads,
        "text_pool_heads": transformer.text_pool_heads,
        "ffn_hidden": transformer.ffn_hidden,
        "codebook_size": 2**made.tokenizer.codebook_dim,
    }
    for name, value in derived.items():
        if given.get(name, value) != value:
            raise ValueError(f"Infinity's {name} is {value} by its other settings, not {reprlib.repr(given[name])}")
