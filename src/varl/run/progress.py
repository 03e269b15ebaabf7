"""How far a run has come, and what it has left: so that no start overwrites what it cannot go on from."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from varl.run.environment import changed_versions, environment
from varl.run.files import replacing, set_aside, writing

__all__ = ["FINISHED", "Progress", "note_start"]

logger = logging.getLogger(__name__)

FINISHED = ("best.safetensors", "weights.safetensors", "adapters.safetensors")
"""Weights that a run writes for others to use."""


class Progress:
    """``progress.json`` of a run folder: the update of the newest checkpoint that was ever whole there; 0 before.

    By it a folder whose checkpoints were removed is told from one of a run that was killed before its first.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "progress.json"

    def _read(self) -> int | None:
        """The update that is noted; None if there is no file, or none that can be read."""
        try:
            newest = json.loads(self.path.read_bytes())["checkpoint"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return newest if type(newest) is int and newest >= 0 else None

    def newest(self) -> int:
        """The update of the newest checkpoint that was ever whole; 0 if none was. A damaged file is set aside."""
        newest = self._read()
        if newest is None and self.path.exists():
            logger.warning("%s cannot be read and is set aside as %s", self.path, set_aside(self.path).name)
        return newest or 0

    def note(self, update: int) -> None:
        """Write that the checkpoint of an update is whole.

        Raises:
            RunError: if the file cannot be written.
        """
        with replacing(self.path) as partial:
            partial.write_text(json.dumps({"checkpoint": update}))

    def evidence(self) -> list[str]:
        """What there is of a run that must have had a checkpoint, in words; empty for a folder that is new, or of a run
        that was killed before its first checkpoint."""
        names, newest = list(FINISHED), self._read()
        if newest == 0:
            names.remove("best.safetensors")  # of the evaluation before the first update
        found = [name for name in names if (self.folder / name).exists()]
        if newest == 0:
            return found
        found += [f"a note of a checkpoint of update {newest}"] if newest else []
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        found += [f"metrics of {lines} updates"] if lines else []
        evaluations = len(list((self.folder / "evaluations").glob("update-*.pt")))
        found += [f"{evaluations} evaluations"] if evaluations else []
        damaged = len(list((self.folder / "checkpoints").glob("update-*.damaged*")))
        return found + ([f"{damaged} damaged checkpoints"] if damaged else [])


def note_start(file: Path, update: int) -> None:
    """Add a line to ``starts.jsonl``: with what the run begins or goes on; versions that changed are warned of.

    Raises:
        RunError: if the file cannot be written.
    """
    now = environment()
    text = file.read_bytes() if file.exists() else b""
    earlier, unreadable = _last_start(text)
    if unreadable:
        logger.warning("%s has %d lines that cannot be read; they stay as they are", file, unreadable)
    changed = changed_versions(earlier, now) if update and earlier else []
    if changed:
        logger.warning("not the versions this run had before: %s; its numbers may differ", "; ".join(changed))
    with writing(file), file.open("a", encoding="utf-8") as lines:
        start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "from_update": update, **now}
        lines.write(("\n" if text and not text.endswith(b"\n") else "") + json.dumps(start) + "\n")


def _last_start(text: bytes) -> tuple[dict[str, Any], int]:
    """The last line that can be read, and how many cannot."""
    found: dict[str, Any] = {}
    unreadable = 0
    for line in text.splitlines():
        try:
            start = json.loads(line)
            if not isinstance(start, dict) or not isinstance(start.get("versions"), dict):
                raise ValueError("not what a start notes")
            found = start
        except (ValueError, RecursionError):
            unreadable += bool(line.strip())
    return found, unreadable
