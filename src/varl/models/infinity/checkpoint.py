"""Infinity's weights on disk, as upstream writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varl.models.infinity.condition import TextEncoder
from varl.models.infinity.config import InfinityConfig, read_config
from varl.models.infinity.model import Transformer
from varl.models.infinity.policy import Infinity
from varl.models.infinity.tokenizer import Tokenizer
from varl.models.parts import find_parts, in_trainer, read_part, state_of, write_tensors
from varl.models.weights import Source, describe, load_strict

__all__ = ["PARTS", "load", "save"]

PARTS = ("transformer", "tokenizer", "text_encoder")
NESTED: dict[str, Sequence[Sequence[str]]] = {
    "transformer": in_trainer("gpt_fsdp", "gpt_wo_ddp", "gpt_ema_fsdp", "gpt_wo_ddp_ema", "gpt_ema_for_vis", "gpt_ema"),
    "tokenizer": in_trainer("vae", "vae_local"),
}
"""Where upstream's files nest a part: those of training, and all tokenizers. What was trained goes before its running
average (EMA), as where upstream makes a small file of one of training."""
FILES = {"transformer": "infinity.pth", "tokenizer": "infinity_vae.pth"}
"""How ``save`` names the parts in a folder."""
MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")


def load(config: Mapping[str, Any] | None = None, weights: Any = None) -> Infinity:
    """See ``varl.load_policy``.

    Args:
        config: see ``config.read_config``. Bits that it does not give are read off the transformer's weights.
        weights: ``"random"``; the transformer's weights; a folder that ``save`` wrote; or a mapping of ``transformer``,
            ``tokenizer`` and ``text_encoder`` (a folder that transformers reads) to theirs. The first two may be
            ``"random"``; the last two may be left out, and then pictures, or conditions from prompts, are refused.
    """
    if isinstance(weights, str) and weights == "random":
        weights = {"transformer": "random", "tokenizer": "random"}
    if isinstance(weights, str | Path) and (Path(weights) / FILES["transformer"]).is_file():
        weights = {part: Path(weights) / name for part, name in FILES.items() if (Path(weights) / name).is_file()}
    sources = find_parts(weights, PARTS, PARTS[:1], "Infinity")
    shape = read_config(config)
    tensors = _read(sources["transformer"], "transformer")
    if tensors is not None:
        shape = _with_bits(shape, config or {}, tensors)
    transformer = _filled(
        lambda: Transformer(shape.transformer, shape.bits, shape.h_div_w), tensors, sources["transformer"]
    )
    if tensors is None:
        transformer.initialise()
    tokenizer = encoder = None
    if "tokenizer" in sources:
        found = _read(sources["tokenizer"], "tokenizer")
        tokenizer = _filled(lambda: Tokenizer(shape.tokenizer), found, sources["tokenizer"]).requires_grad_(False)
    if "text_encoder" in sources:
        encoder = _encoder(sources["text_encoder"], shape.transformer.text_maxlen)
    return Infinity(shape, transformer, tokenizer, encoder).eval()


def save(policy: Infinity, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a policy's weights as upstream reads them.

    Args:
        path: a file, which gets the transformer alone (``.safetensors``, otherwise upstream's torch format); or a
            folder (a name without a suffix), which gets both parts in upstream's format.
        dtype: of floating tensors.
    """
    path = Path(path)
    file = path if path.suffix else path / FILES["transformer"]
    write_tensors(state_of(policy.transformer, dtype), file, {"family": "infinity"})
    if not path.suffix and policy.tokenizer is not None:
        write_tensors({"vae": state_of(policy.tokenizer, dtype)}, path / FILES["tokenizer"])


def _read(source: Source, part: str) -> dict[str, Tensor] | None:
    """A part's tensors, None for random ones."""
    return None if isinstance(source, str) and source == "random" else read_part(source, NESTED[part])[0]


M = TypeVar("M", bound=nn.Module)


def _filled(build: Callable[[], M], tensors: dict[str, Tensor] | None, source: Source) -> M:
    """A module with the given weights, or its own random ones."""
    if tensors is None:
        return build()
    with torch.device("meta"):
        module = build()
    if isinstance(module, Tokenizer):
        tensors = _upstream_names(tensors, module)
    load_strict(module, tensors, describe(source))
    return module


def _upstream_names(tensors: dict[str, Tensor], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """As upstream reads tokenizers: also names without the wrapper around convolutions and norms, and no masks."""
    unwrapped = {}
    for key in tokenizer.state_dict():
        for wrapper in (".conv", ".norm"):
            for leaf in (".weight", ".bias"):
                if key.endswith(wrapper + leaf):
                    unwrapped[key.removesuffix(wrapper + leaf) + leaf] = key
    expected = tokenizer.state_dict().keys()
    named = {key if key in expected else unwrapped.get(key, key): value for key, value in tensors.items()}
    bits = tokenizer.config.codebook_dim
    return {mask: 2 ** torch.arange(bits - 1, -1, -1, device="cpu") for mask in MASKS} | named


def _with_bits(shape: InfinityConfig, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> InfinityConfig:
    """The shape with the tokenizer's bits as the transformer's weights have them, unless they are given."""
    names = {*given, *(given.get("tokenizer") or {}), *(given.get("transformer") or {})}
    enter = tensors.get("word_embed.weight")
    if names & {"codebook_dim", "vae_type", "d_vae"} or enter is None or enter.ndim != 2:
        return shape
    per_token = 4 if shape.apply_spatial_patchify else 1
    return replace(shape, tokenizer=replace(shape.tokenizer, codebook_dim=enter.shape[1] // per_token))


def _encoder(source: Source, tokens: int) -> TextEncoder:
    if not isinstance(source, str | Path):
        raise ValueError("Infinity's text_encoder is a local folder that transformers reads")
    return TextEncoder(source, tokens)
