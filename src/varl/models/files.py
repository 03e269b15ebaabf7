"""Files of strangers: what kind each one really is, and what it holds, read without executing code; and our own."""

from __future__ import annotations

import errno
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from varl.strict_json import RepeatedKey, parse_json

__all__ = ["plain", "read_json", "read_safetensors", "read_torch", "sort_metadata", "write_safetensors"]

HEAD = 512
MOST_JSON = 64 * 2**20
"""Bytes of an index of shards or of a configuration; published ones have some thousands."""
MOST_SHOWN = 200
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|\?xml|error)", re.IGNORECASE)
_ZIP, _PICKLE, _LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_REFUSED = re.compile(r"GLOBAL (\S+)|(?:class|function) (\S+\.\S+)")


def plain(text: object) -> str:
    """What a file says of itself, fit for a message: one line, without terminal codes, not too long."""
    line = "".join(c if c.isprintable() else " " for c in _TERMINAL_CODE.sub("", str(text))).strip()
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."


def _head(path: Path, kind: str) -> bytes:
    """The beginning of a file that is no stand-in for one of a kind.

    Raises:
        ValueError: if the file is empty, a pointer of Git LFS, or a page of a web site.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise ValueError(f"{path} is not a whole {kind}: it is empty, written or downloaded not even in part")
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d{1,18})$", head, re.MULTILINE)
        real = f" of {int(size[1]):,} bytes" if size else ""
        raise ValueError(
            f"{path} is not a whole {kind}: it is a Git LFS pointer to the file{real}; run git lfs pull in its folder"
        )
    if _HTML.match(head):
        raise ValueError(
            f"{path} is not a whole {kind}: it is an HTML or XML page, which a web site sent instead; download it again"
        )
    return head


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: if it is none, gives a key twice, or is larger than ``MOST_JSON``.
    """
    _head(path, "JSON file")
    if (size := path.stat().st_size) > MOST_JSON:
        raise ValueError(f"{path} has {size:,} bytes; a JSON file beside weights has at most {MOST_JSON:,}")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except RepeatedKey as error:
        raise ValueError(f"{path} {plain(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {plain(error)}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        ValueError: if it is not whole, or no such file.
    """
    head = _head(path, "safetensors file")
    if _is_torch(head):
        raise ValueError(f"{path} is not a whole safetensors file: it is a torch file; let its name end in .pth")
    # A file of a stranger can fail to be read in ways of its own: whatever it is, it is the file's fault.
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, dict(file.metadata() or {})
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file: {plain(error)}") from error


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata; the same ones always give the same bytes.

    Args:
        tensors: by name; contiguous, and none of them a part of another.
    """
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file, which its library writes in random order, in the order of its keys."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            if len(text) == size:  # as it is, but for another spelling of the same text
                file.seek(8)
                file.write(text)


def read_torch(path: Path) -> Any:
    """What a torch file holds: a zip file, or one of torch's format before 1.6. No code of it is executed.

    Raises:
        ValueError: if it is not whole, no torch file, or holds anything but tensors and plain values.
    """
    head = _head(path, "torch file")
    if not _is_torch(head):
        raise ValueError(f"{path} is not a whole torch file: {_what(head)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which are read all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(_ZIP))
    except Exception as error:
        raise ValueError(_why(path, error)) from error


def _is_torch(head: bytes) -> bool:
    # A safetensors file begins with the length of its header, which can be any bytes, and then the header.
    return head.startswith((_ZIP, _PICKLE)) and head[8:9] != b"{"


def _what(head: bytes) -> str:
    """What a file is that no torch file begins like."""
    size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and size < 2**32:
        return "it is a safetensors file; let its name end in .safetensors"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed; unpack it first"
    if head[257:262] == b"ustar":
        return "it is a tar archive, the format of torch before 0.2; save it again with a newer torch"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        return f"it is a text that begins with {plain(head[:40].decode('ascii'))!r}"
    return "it begins neither as a zip file nor as a pickle"


def _why(path: Path, error: Exception) -> str:
    text = _TERMINAL_CODE.sub("", str(error))
    if "TorchScript" in text:
        return f"{path} is a TorchScript archive, which is code, not a torch file of plain tensors: save a state dict"
    if refused := _REFUSED.search(text):
        name = plain(refused[1] or refused[2])
        return (
            f"{path} is not a torch file of plain tensors: it names {name}, which is code and is not executed; save a "
            "state dict alone"
        )
    cut = isinstance(error, EOFError | IndexError) or "EOF" in text or "central directory" in text
    if cut or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return f"{path} is not a whole torch file: it is cut short"
    reason = text.rpartition("WeightsUnpickler error:")[2].strip() or repr(error)
    return f"{path} is not a whole torch file of plain tensors: {plain(reason.splitlines()[0])}"
