"""Checkpoints of a run: written beside, then renamed; the newest readable one is gone on from."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder of a run's checkpoints, ``update-000040.pt`` after 40 updates.

    Args:
        folder: made when the first one is saved.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("update-*.pt"))

    def save(self, update: int, state: dict[str, Any]) -> Path:
        """Write one checkpoint and remove those beyond ``keep``; a crash leaves the old ones whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"update-{update:06d}.pt"
        beside = path.with_suffix(".partial")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None if there is none. Loads tensors and plain values only.

        Raises:
            RuntimeError: if there are checkpoints but none can be read.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
                return state
            except Exception as error:
                logger.warning("checkpoint %s cannot be read (%s); trying the one before", path, error)
        if paths:
            raise RuntimeError(f"none of the {len(paths)} checkpoints in {self.folder} can be read")
        return None
