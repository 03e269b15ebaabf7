"""Made-up wheels, and a tree whose parts are stand-ins."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["make_wheel"]


def make_wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), tag: str = "py3-none-any", padding: int = 0
) -> Path:
    """A wheel of one module, whose ``VERSION`` is the version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    head = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {line}" for line in requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n" + "#" * padding)
        archive.writestr(f"{info}/METADATA", "\n".join(head) + "\n\ndescription\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
