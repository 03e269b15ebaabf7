"""VAR's weights on disk: upstream's state dicts, one for the transformer and one for the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from varl.models.coded import load_tokenizer, load_transformer
from varl.models.parts import find_parts, save_parts
from varl.models.var.model import initialise
from varl.models.var.policy import Var, VarConfig

__all__ = ["load", "save"]

PARTS = ("transformer", "tokenizer")


def load(config: Mapping[str, Any] | None = None, weights: Any = None) -> Var:
    """See ``varl.load_policy``; ``config`` is that of ``VarConfig.of``, the parts are transformer and tokenizer."""
    shape = VarConfig.of(config)
    if isinstance(weights, str) and weights == "random":
        policy = Var(shape)
        initialise(policy.transformer)
        return policy.eval()
    sources = find_parts(weights, PARTS, PARTS, "VAR")
    with torch.device("meta"):
        policy = Var(shape)
    load_transformer(policy.transformer, sources["transformer"])
    load_tokenizer(policy.tokenizer, sources["tokenizer"])
    return policy.eval()


def save(policy: Var, path: Path) -> None:
    """Write the transformer to a file (``.safetensors`` or ``.pth``), or both parts to a folder (no suffix)."""
    save_parts({"transformer": policy.transformer, "tokenizer": policy.tokenizer}, Path(path))
