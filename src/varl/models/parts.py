"""Families of several parts, each with its own checkpoint: which sources are given, and writing them back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varl.models.files import write_safetensors
from varl.models.weights import Source, describe, part_sources, read_tensors

__all__ = ["find_parts", "in_trainer", "read_part", "save_parts", "state_of", "write_tensors"]


def find_parts(weights: Any, parts: Sequence[str], needed: Sequence[str], family: str) -> dict[str, Source]:
    """The source of every part, all of ``needed`` among them.

    A folder with a file (``transformer.safetensors``) or folder of the first part's name stands for all parts that it
    holds, as ``save_parts`` writes it.

    Raises:
        ValueError: if nothing is given, a part is none of the family's, or one that is needed is missing.
    """
    wanted = ", ".join(needed)
    if weights is None:
        raise ValueError(f'{family} comes without weights: give local paths for {wanted}, or "random"')
    if isinstance(weights, str | Path) and Path(weights).is_dir():
        found = {path.stem: path for path in sorted(Path(weights).iterdir()) if path.stem in parts}
        weights = found if parts[0] in found else weights
    sources = part_sources(weights, parts, family)
    missing = [part for part in needed if sources.get(part) is None]
    if missing:
        raise ValueError(f"{family} needs weights for its {', '.join(missing)}; given are {', '.join(sources)}")
    return sources


def in_trainer(*names: str) -> list[tuple[str, ...]]:
    """Where a file of upstream's training may hold a part: under ``trainer`` or alone, the first name first."""
    return [path for name in names for path in (("trainer", name), (name,))]


def read_part(source: Source, nested: Sequence[Sequence[str]] = ()) -> tuple[dict[str, Tensor], str]:
    """A part's tensors, which no one else holds, and how messages name their source. See ``read_tensors``."""
    tensors = read_tensors(source, nested)
    if isinstance(source, Mapping):
        tensors = {key: value.detach().clone() for key, value in tensors.items()}
    return tensors, describe(source)


def save_parts(parts: Mapping[str, nn.Module], path: Path) -> None:
    """Write parts under their checkpoints' keys, floating tensors in fp32.

    Args:
        parts: first the one that is tuned.
        path: a ``.safetensors`` or ``.pth`` file, which then holds the first part alone; or a folder (no suffix), which
            gets one safetensors file a part.

    Raises:
        ValueError: if the path ends otherwise.
    """
    if path.suffix not in (".safetensors", ".pth", ""):
        raise ValueError(f"weights are written to .safetensors or .pth files or to a folder, not to {path}")
    if not path.suffix:
        for name, module in parts.items():
            save_parts({name: module}, path / f"{name}.safetensors")
        return
    write_tensors(state_of(next(iter(parts.values()))), path)


def state_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A module's tensors as files hold them: on the CPU, floating ones of ``dtype``."""
    state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
    return {key: (v.to(dtype) if v.is_floating_point() else v).contiguous() for key, v in state.items()}


def write_tensors(content: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a ``.safetensors`` file (with its metadata), or to a torch file of any other suffix.

    It is written beside and renamed: the tensors may be mapped from the very file that is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    if path.suffix == ".safetensors":
        write_safetensors(content, beside, metadata)
    else:
        torch.save(content, beside)
    os.replace(beside, path)
