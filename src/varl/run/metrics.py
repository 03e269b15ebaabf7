"""The metrics of a run: one JSON line an update in ``metrics.jsonl``, mirrored to TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from varl.run.files import free_name, replacing, writing

__all__ = ["MetricsWriter", "read_metrics"]

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl`` and writes TensorBoard events to ``folder/tensorboard``.

    Every line is on the disk when ``write`` returns. A last line that an interrupted run left half written is dropped
    with a warning. Where other lines cannot be read, the file is kept as ``metrics.jsonl.damaged``, and the run goes on
    with the lines that can. If TensorBoard cannot be written, that is said once and the rest goes on.

    Args:
        folder: made if it is not there.
        tensorboard: False writes the lines only.

    Attributes:
        path: of the JSON lines.
        last_update: the update of the last line, or None.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool = True) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._events: Any = None
        self.last_update: int | None = None
        if self.path.exists():
            lines, wrong = _scan(self.path)
            rising = _rising(lines)
            if wrong or len(rising) < len(lines):
                self._keep_damaged(wrong[0] if wrong else f"{self.path} has updates out of order")
                lines = rising
                self._rewrite(lines)
            elif not self.path.read_bytes().endswith(b"\n"):
                self._rewrite(lines)
            self.last_update = lines[-1]["update"] if lines else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one update's metrics.

        Args:
            record: ``update`` (a number above that of the line before) and whatever there is to log: numbers, texts,
                booleans, None, tensors and arrays of numbers, lists and mappings of these. A number that is not finite
                is written as null. TensorBoard gets the numbers: nested names joined by ``/``, the entries of a list
                (one a scale) as ``name/step_0``, ``name/step_1``, ...

        Raises:
            ValueError: if ``update`` is missing, no integer, or not above that of the line before.
            TypeError: if a value cannot be written; the message names it.
            RunError: if the file cannot be written. A line half written is dropped when the run goes on.
        """
        update = record.get("update")
        if not isinstance(update, int) or isinstance(update, bool):
            raise ValueError(f"a record of metrics needs an integer 'update', got {update!r}")
        if self.last_update is not None and update <= self.last_update:
            raise ValueError(
                f"update {update} comes after {self.last_update} in {self.path}; a run that goes on from an earlier "
                "update calls truncate_after first"
            )
        line = {str(name): _plain(value, str(name)) for name, value in record.items()}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._mirror(update, line)
        self.last_update = update

    def truncate_after(self, update: int) -> None:
        """Drop the lines of later updates, so that a resumed run's file is that of one never interrupted.

        Lines that are missing before ``update`` are warned of. Lines that do not follow it one by one are damage: the
        file is then kept, too.

        TensorBoard hides what it has of later updates as soon as the next one is written.
        """
        lines = _read(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["update"] <= update]
        if len(kept) < len(lines):
            later = (line["update"] for line in lines[len(kept) :])
            strange = next((number for due, number in enumerate(later, update + 1) if number != due), None)
            if strange is not None:
                self._keep_damaged(f"{self.path} has a line of update {strange}, but none of the update before it")
            self._rewrite(kept)
        self.last_update = kept[-1]["update"] if kept else None
        self._close_events()
        missing = sorted(set(range(1, update + 1)) - {line["update"] for line in kept})
        if missing:
            span = f"{len(missing)} of the {update} updates so far, the first of them {missing[0]}"
            logger.warning("%s lacks %s; the run goes on without them", self.path, span)

    def close(self) -> None:
        """Finish TensorBoard's file. Writing may go on afterwards, in a new one."""
        self._close_events()

    def _keep_damaged(self, reason: str) -> None:
        with writing(kept := free_name(self.path.with_name(f"{self.path.name}.damaged"))):
            shutil.copy2(self.path, kept)
        logger.warning("%s; what can be read is gone on with, and the file is kept as %s", reason, kept.name)

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _mirror(self, update: int, line: Mapping[str, Any]) -> None:
        if not self._tensorboard:
            return
        try:
            if self._events is None:
                from torch.utils.tensorboard import SummaryWriter

                where = str(self.folder / "tensorboard")
                self._events = SummaryWriter(where, purge_step=update)
            for name, value in _scalars({k: v for k, v in line.items() if k != "update"}):
                self._events.add_scalar(name, value, update)
            self._events.flush()
        except Exception as error:  # whatever it is, the run is worth more than its second record
            self._give_up(error)

    def _close_events(self) -> None:
        events, self._events = self._events, None
        try:
            if events is not None:
                events.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("TensorBoard cannot be written (%s); metrics go to %s only", error, self.path)
        self._tensorboard, self._events = False, None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, oldest first; ``path`` is the file or the run's folder. Nothing is changed.

    A last line that cannot be read (half written) is left out with a warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if another line cannot be read, or is no object with an integer ``update``; the message names it.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}")
    return _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    lines, wrong = _scan(path)
    if wrong:
        raise ValueError(wrong[0])
    return lines


def _rising(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines whose update is above those of all lines before."""
    highest, kept = -1, []
    for line in lines:
        if line["update"] > highest:
            highest = line["update"]
            kept.append(line)
    return kept


def _scan(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines that can be read, and what is wrong with the others, but for a last one that is half written."""
    lines: list[dict[str, Any]] = []
    wrong: list[str] = []
    raw = path.read_bytes().split(b"\n")
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or type(line.get("update")) is not int:
                raise ValueError("not an object with an integer 'update'")
        except (ValueError, RecursionError) as error:
            if number == len(raw):  # no line end: the write was interrupted
                logger.warning("%s, line %d is half written and dropped", path, number)
                break
            wrong.append(f"{path}, line {number} cannot be read: {error}")
            continue
        lines.append(line)
    return lines, wrong


def _plain(value: Any, name: str) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}/step_{i}") for i, item in enumerate(value)]
    raise TypeError(f"metric {name!r} is a {type(value).__name__}, which cannot be written; log a number or a text")


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a plain value, by their joined names; texts and null have none."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(item, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        for step, item in enumerate(value):
            yield from _scalars(item, f"{name}/step_{step}")
    elif isinstance(value, bool | int | float):
        yield name, float(value)
