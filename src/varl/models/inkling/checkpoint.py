"""Inkling's weights on disk: one safetensors file, with the model's shape in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from varl.models.fields import fill
from varl.models.files import plain, read_safetensors, write_safetensors
from varl.models.inkling.policy import Inkling, InklingConfig
from varl.models.weights import load_strict, read_tensors, unwrapped

__all__ = ["PACKAGED", "load", "save"]

PACKAGED = Path(str(files("varl.models.inkling") / "data" / "inkling.safetensors"))

TORCH = (".pth", ".pt", ".bin", ".ckpt")
"""Endings of torch files, which do not say the shape: that is then the default's, or given."""


def save(policy: Inkling, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a policy's weights and shape; ``dtype`` float16 halves the file."""
    tensors = {key: value.detach().to(dtype).contiguous() for key, value in policy.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path, {"family": "inkling", "config": json.dumps(asdict(policy.config))})


def load(config: Mapping[str, Any] | None = None, weights: str | Path | Mapping[str, Any] | None = None) -> Inkling:
    """See ``varl.load_policy``."""
    if weights == "random":
        return Inkling(fill(InklingConfig, config, "Inkling"))
    if isinstance(weights, Mapping):
        if set(weights) != {"model"}:
            raise ValueError(f"Inkling has one part, 'model', not {sorted(weights)}")
        weights = weights["model"]
    if isinstance(weights, Mapping):
        return _build(config, read_tensors(weights), "the state dict given")
    if not isinstance(weights, str | Path | None):
        raise ValueError(f"Inkling's weights are a path or a state dict, not {plain(repr(weights))}")
    path = Path(weights) if weights is not None else PACKAGED
    if not path.is_file():
        raise FileNotFoundError(f"no Inkling weights at {path}")
    if path.suffix in TORCH:
        return _build(config, read_tensors(path), str(path))
    tensors, metadata = read_safetensors(path)
    if metadata.get("family") != "inkling":
        family = plain(metadata.get("family", "an unnamed family"))
        raise ValueError(f"{path} holds weights of {family}, not Inkling")
    try:
        saved = dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say what shape of Inkling its weights have: {plain(repr(error))}") from error
    return _build(saved | dict(config or {}), unwrapped(tensors, str(path)), str(path))


def _build(config: Mapping[str, Any] | None, tensors: dict[str, torch.Tensor], source: str) -> Inkling:
    try:
        shape = fill(InklingConfig, config, f"the Inkling of {source}")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with torch.device("meta"):
        load_strict(Inkling(shape), tensors, source)  # before memory is taken for what the file does not hold
    policy = Inkling(shape)
    load_strict(policy, tensors, source)
    return policy.eval()
