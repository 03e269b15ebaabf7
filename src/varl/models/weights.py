"""Weights of upstream checkpoints: read without executing code, checked key by key, loaded strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from varl.models.files import plain, read_json, read_safetensors, read_torch

__all__ = [
    "Source",
    "check_finite",
    "check_fit",
    "describe",
    "load_strict",
    "part_sources",
    "read_tensors",
    "unwrapped",
]

Source = str | Path | Sequence[str | Path] | Mapping[str, Tensor]
"""Where the weights of one part come from: a file, a folder, several files, or a state dict."""

SHOWN = 3
COMMON: Sequence[Sequence[str]] = [("state_dict",), ("model_state_dict",), ("model",), ("module",)]
"""Where files of any family may hold the state dict, unless it is where the family's own do."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that torch puts between those of modules: torch.compile, FSDP and activation checkpointing."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    joined. Keys lose what torch.compile, FSDP and DDP add to them.

    Args:
        nested: key paths under which torch files may hold the state dict, tried in order before ``COMMON`` and the
            file's top level; for example ``[("trainer", "gpt_fsdp")]``.

    Raises:
        FileNotFoundError: if a file, or a shard that an index names, is missing.
        ValueError: if a file is not whole, holds no tensors, or two files hold one key.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, nested, describe(source))
    if isinstance(source, str | Path):
        files = _files(Path(source))
    elif isinstance(source, Sequence) and source and all(isinstance(path, str | Path) for path in source):
        files = [file for path in source for file in _files(Path(path))]
    else:
        raise ValueError(f"weights are a path, a list of paths or a state dict, not {plain(repr(source))}")
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
    content = read_json(path)
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(shards, Mapping) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} is not an index of shards: it has no weight_map of keys to files")
    return _shards(path, sorted(set(shards.values())))


def _shards(index: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or not name.isprintable():
            raise ValueError(f"{index} names a shard outside its own folder: {plain(name)!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(names)} shards, of which {len(missing)} are missing: {plain(missing[0])}"
        )
    return [index.parent / name for name in names]


def _read_file(path: Path, nested: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    content = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)
    return _unwrap(content, nested, str(path))


def _unwrap(content: Any, nested: Sequence[Sequence[str]], source: str) -> dict[str, Tensor]:
    for paths in (nested, COMMON):
        content = next((inner for keys in paths if (inner := _inside(content, keys))), content)
    wrong = (
        [key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        if isinstance(content, Mapping)
        else []
    )
    if not isinstance(content, Mapping) or not content or wrong:
        what = type(content).__name__
        if wrong:
            what = f"its entry {plain(wrong[0])!r} is a {type(content[wrong[0]]).__name__}"
        raise ValueError(f"{source} holds no state dict of tensors ({what})")
    return unwrapped(content, source)


def _inside(content: Any, keys: Sequence[str]) -> Mapping[Any, Any] | None:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else None


def unwrapped(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under their modules' own names: without ``module.`` before them and without any of ``WRAPPERS``.

    Raises:
        ValueError: if two keys have one name.
    """
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in named:
            raise ValueError(f"{source} holds {plain(name)} twice, as {plain(key)} too")
        named[name] = value
    return named


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """That a state dict has the keys, the shapes and the kinds of numbers of another.

    Raises:
        ValueError: with the first few that differ, and how many there are.
    """
    both = sorted(expected.keys() & given.keys())
    differing = [
        f"{key} is {list(given[key].shape)}, not {list(expected[key].shape)}"
        for key in both
        if expected[key].shape != given[key].shape
    ]
    lacking, foreign = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    kinds = [f"{key} is {_kind(given[key])}" for key in both if not _same_kind(expected[key], given[key])]
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} of {len(expected)} keys are missing ({_some(lacking)})")
    if foreign:
        problems.append(f"{len(foreign)} of {len(given)} keys are not this model's ({_some(foreign)})")
    if differing:
        problems.append(f"{len(differing)} shapes differ ({_some(differing)})")
    if kinds:
        names = sorted({str(dtype).removeprefix("torch.") for dtype in FLOATS})
        problems.append(f"{len(kinds)} tensors are not of {', '.join(names)} as weights are ({_some(kinds)})")
    if problems:
        raise ValueError(f"weights of {source} do not fit: {'; '.join(problems)}")


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{tensor.layout} ".removeprefix("torch.")
    return layout + str(tensor.dtype).removeprefix("torch.")


def _same_kind(expected: Tensor, given: Tensor) -> bool:
    """Weights take floating numbers; tables of whole numbers, such as positions, take whole numbers of any size."""
    if given.is_meta:
        return True  # a description, which has no numbers
    if given.layout != torch.strided or given.is_quantized:
        return False
    if expected.is_floating_point():
        return given.dtype in FLOATS
    return not given.is_floating_point() and given.is_complex() == expected.is_complex()


def check_finite(tensors: Mapping[str, Tensor], source: str, tables: Iterable[str] = ()) -> None:
    """That no floating tensor but ``tables`` holds NaN or infinity; one pass, which takes no memory.

    Raises:
        ValueError: with the first few that do, and how many there are.
    """
    checked = {key: t for key, t in tensors.items() if t.is_floating_point() and not t.is_meta and t.numel()}
    bad = [key for key in sorted(checked.keys() - set(tables)) if not _finite(checked[key])]
    if bad:
        raise ValueError(f"weights of {source} hold NaN or infinity in {len(bad)} of {len(tensors)} ({_some(bad)})")


def _finite(tensor: Tensor) -> bool:
    # NaN is passed on to both ends: a tenth of the time of isfinite, which makes tensors of the same size.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    ignore: Sequence[str] = (),
    cast: bool = True,
    tables: Sequence[str] = (),
) -> None:
    """Load a state dict whose keys and shapes must be the module's own, and whose numbers must be finite.

    A module built on the meta device takes the tensors themselves; any other copies them.

    Args:
        ignore: keys of the file that carry nothing and are passed over.
        cast: floating tensors become fp32; False leaves their dtype (for modules on the meta device).
        tables: keys of masks, which hold infinities; the caller checks them.

    Raises:
        ValueError: with the first few keys, shapes, types or values that cannot be used, and how many there are.
    """
    given = {key: value for key, value in tensors.items() if key not in ignore}
    expected = module.state_dict()
    check_fit(expected, given, source)
    if cast:
        given = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
    check_finite(given, source, tables)
    meta = any(value.is_meta for value in expected.values())
    module.load_state_dict(_apart(given), strict=True, assign=meta)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that have memory of their own: one that is tied, a view or stretched could not be trained in place."""
    known: set[int] = set()
    own = {}
    for key, value in tensors.items():
        storage = value.untyped_storage()
        alone = storage.nbytes() == value.nbytes and storage.data_ptr() not in known
        known.add(storage.data_ptr())
        own[key] = value if alone or value.is_meta else value.clone(memory_format=torch.contiguous_format)
    return own


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(plain, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
