"""Weights of upstream checkpoints: read without executing code, checked key by key, loaded strictly."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["Source", "describe", "load_strict", "part_sources", "read_tensors"]

Source = str | Path | Sequence[str | Path] | Mapping[str, Tensor]
"""Where the weights of one part come from: a file, a folder, several files, or a state dict."""

SHOWN = 3


def describe(source: Source) -> str:
    """How error messages name a source."""
    if isinstance(source, Mapping):
        return "the state dict given"
    return str(source) if isinstance(source, str | Path) else ", ".join(str(path) for path in source)


def part_sources(weights: Any, parts: Sequence[str], family: str) -> dict[str, Source]:
    """The sources of a family's parts, from the ``weights`` of ``varl.load_policy``.

    Args:
        weights: a mapping of part name to source, or one source, which is then that of the first part.

    Raises:
        ValueError: if a part is none of the family's.
    """
    names = set(weights) if isinstance(weights, Mapping) else set()
    tensors = isinstance(weights, Mapping) and all(isinstance(value, Tensor) for value in weights.values())
    if not isinstance(weights, Mapping) or (tensors and not names & set(parts)):
        return {parts[0]: weights}
    if names - set(parts):
        raise ValueError(f"{family} has no part {sorted(names - set(parts))[0]!r}; its parts are {', '.join(parts)}")
    return dict(weights)


def read_tensors(source: Source, nested: Sequence[Sequence[str]] = ()) -> dict[str, Tensor]:
    """The tensors of a source, on the CPU; no code of a file is executed.

    A path is a ``.safetensors`` file, a torch file (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), an index of shards
    (``*.index.json``), or a folder that holds one index, or otherwise files of one of these kinds. Several files are
    joined.

    Args:
        nested: key paths under which torch files may hold the state dict, tried in order before the file's top level;
            for example ``[("trainer", "gpt_fsdp")]``.

    Raises:
        FileNotFoundError: if a file, or a shard that an index names, is missing.
        ValueError: if a file is not whole, holds no tensors, or two files hold one key.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, nested, describe(source))
    if isinstance(source, str | Path):
        files = _files(Path(source))
    else:
        files = [file for path in source for file in _files(Path(path))]
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_file(file, nested)
        double = sorted(tensors.keys() & found.keys())
        if double:
            raise ValueError(f"{file} holds {double[0]} ({len(double)} keys in all), which another file holds too")
        tensors |= found
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        index = sorted(path.glob("*.index.json"))
        if len(index) > 1:
            raise ValueError(f"{path} holds {len(index)} indices of shards; name the one that is meant")
        found = index or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth")) or sorted(path.glob("*.bin"))
        if not found:
            raise FileNotFoundError(f"no weights (*.safetensors, *.pth, *.bin or *.index.json) in {path}")
        return [file for entry in found for file in _files(entry)]
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix != ".json":
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of shards with a weight_map: {error!r}") from error
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(shards)} shards, of which {len(missing)} are missing: {missing[0]}")
    return [path.parent / name for name in shards]


def _read_file(path: Path, nested: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    # A file of a stranger can fail to be read in ways of its own: whatever it is, it is the file's fault.
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        cut = isinstance(error, OSError) and error.errno == errno.EINVAL
        reason = "it is cut short" if cut else str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} is not a whole torch file of plain tensors: {reason}") from error
    return _unwrap(content, nested, str(path))


def _unwrap(content: Any, nested: Sequence[Sequence[str]], source: str) -> dict[str, Tensor]:
    for keys in nested:
        inner = content
        for key in keys:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            content = inner
            break
    wrong = (
        [key for key, value in content.items() if not isinstance(value, Tensor)] if isinstance(content, dict) else []
    )
    if not isinstance(content, Mapping) or not content or wrong:
        what = f"its entry {wrong[0]!r} is a {type(content[wrong[0]]).__name__}" if wrong else type(content).__name__
        raise ValueError(f"{source} holds no state dict of tensors ({what})")
    return dict(content)


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, ignore: Sequence[str] = (), cast: bool = True
) -> None:
    """Load a state dict whose keys and shapes must be the module's own.

    A module built on the meta device takes the tensors themselves; any other copies them.

    Args:
        ignore: keys of the file that carry nothing and are passed over.
        cast: floating tensors become fp32; False leaves their dtype (for modules on the meta device).

    Raises:
        ValueError: with the first few keys and shapes that differ, and how many there are.
    """
    given = {key: value for key, value in tensors.items() if key not in ignore}
    expected = module.state_dict()
    lacking, foreign = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    shapes = [key for key in sorted(expected.keys() & given.keys()) if expected[key].shape != given[key].shape]
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} of {len(expected)} keys are missing ({_some(lacking)})")
    if foreign:
        problems.append(f"{len(foreign)} of {len(given)} keys are not this model's ({_some(foreign)})")
    if shapes:
        differing = [f"{key} is {list(given[key].shape)}, not {list(expected[key].shape)}" for key in shapes]
        problems.append(f"{len(shapes)} shapes differ ({_some(differing)})")
    if problems:
        raise ValueError(f"weights of {source} do not fit: {'; '.join(problems)}")
    meta = any(value.is_meta for value in expected.values())
    if cast:
        given = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
    module.load_state_dict(given, strict=True, assign=meta)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
