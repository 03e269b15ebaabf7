"""Switti's weights on disk: upstream's state dicts, and the folders of two CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch

from varl.models.coded import load_tokenizer, load_transformer
from varl.models.files import read_json
from varl.models.parts import find_parts, save_parts
from varl.models.switti.condition import TextEncoders
from varl.models.switti.model import TransformerConfig, initialise
from varl.models.switti.policy import Switti, SwittiConfig
from varl.models.weights import Source

__all__ = ["load", "save"]

PARTS = ("transformer", "tokenizer", "text_encoder", "text_encoder_2")
ENCODERS = PARTS[2:]


def load(config: Mapping[str, Any] | None = None, weights: Any = None) -> Switti:
    """See ``varl.load_policy``; ``config`` is that of ``SwittiConfig.of``.

    The parts are transformer and tokenizer, and, to condition on texts, text_encoder (CLIP ViT-L/14) and
    text_encoder_2 (OpenCLIP ViT-bigG/14), each a local folder as transformers saves it, with its tokenizer.
    """
    if isinstance(weights, str) and weights == "random":
        policy = Switti(SwittiConfig.of(config))
        initialise(policy.transformer)
        return policy.eval()
    sources = find_parts(weights, PARTS, PARTS[:2], "Switti")
    shape = SwittiConfig.of(config, _saved(sources["transformer"]))
    encoders = _encoders(sources)
    with torch.device("meta"):
        policy = Switti(shape, encoders)
    hint = " (use_ar says which attention)"
    load_transformer(policy.transformer, sources["transformer"], shape.transformer.use_ar, hint)
    load_tokenizer(policy.tokenizer, sources["tokenizer"])
    return policy.eval()


def _encoders(sources: Mapping[str, Source]) -> TextEncoders | None:
    given = [sources[name] for name in ENCODERS if sources.get(name) is not None]
    if len(given) == 1 or not all(isinstance(folder, str | Path) for folder in given):
        raise ValueError(f"Switti needs both text encoders, {' and '.join(ENCODERS)}, each a local folder, or none")
    return TextEncoders(cast(Any, tuple(given))) if given else None


def _saved(source: Source) -> dict[str, Any]:
    """The transformer's fields in the ``config.json`` of a folder of weights, if it has one."""
    path = Path(source) / "config.json" if isinstance(source, str | Path) else None
    if path is None or not path.is_file():
        return {}
    try:
        values = dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a configuration: {error}") from error
    known = {"reso", *(f.name for f in fields(TransformerConfig))}
    return {name: value for name, value in values.items() if name in known}


def save(policy: Switti, path: Path) -> None:
    """Write the transformer to a file (``.safetensors`` or ``.pth``), or it and the tokenizer to a folder."""
    save_parts({"transformer": policy.transformer, "tokenizer": policy.tokenizer}, Path(path))
