"""The held-out evaluations in a run's folder: numbers as JSON, and what they were made of, pictures included."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varl.evaluation.held_out import Evaluation, asked
from varl.policy import Prompt
from varl.run.files import replacing, set_aside

__all__ = ["Evaluations"]

logger = logging.getLogger(__name__)


class Evaluations:
    """``update-000040.json`` for readers and ``update-000040.pt`` with the pictures, after 40 updates.

    Each holds its prompts, so that only evaluations of the same prompts are compared. A file that cannot be read is
    named in the log and set aside as ``update-000040.pt.damaged``.

    Args:
        folder: made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def updates(self) -> list[int]:
        """After how many updates there were evaluations, in order."""
        return sorted({number for path, number in self._files() if path.suffix == ".pt"})

    def save(self, update: int, result: Evaluation, about: dict[str, Any]) -> None:
        """Write an evaluation.

        Args:
            about: what its JSON says beside the result.

        Raises:
            RunError: if a file cannot be written.
        """
        kept = {name: getattr(result, name) for name in ("images", "texts", "made_by")}
        kept |= {name: _tensor(getattr(result, name)) for name in ("rewards", "hits", "neds")}
        kept["prompts"] = [(text, list(words), label) for text, words, label in asked(result.prompts)]
        with replacing(self._path(update, "json")) as partial:
            partial.write_text(json.dumps({"update": update, **about, **result.to_dict()}, indent=1))
        torch.save(kept, buffer := io.BytesIO())  # to a file, it would say nothing of a full disk but where it was
        with replacing(self._path(update, "pt")) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load(self, update: int) -> Evaluation | None:
        """The evaluation after so many updates; None if it cannot be read, and is then set aside."""
        path = self._path(update, "pt")
        try:
            return _evaluation(torch.load(path, weights_only=True), self._path(update, "json"))
        except Exception as error:  # whatever it is, the run is worth more than a comparison with this
            _warn(path, error)
            return None

    def alarm(self, update: int) -> list[str]:
        """The metrics that fell while the training reward rose, as the JSON says; none if it cannot be read."""
        path = self._path(update, "json")
        try:
            falling = json.loads(path.read_bytes())["alarm"]
            if not isinstance(falling, list) or not all(isinstance(name, str) for name in falling):
                raise ValueError("its 'alarm' is no list of metrics")
            return falling
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            _warn(path, error)
            return []

    def pair(self) -> tuple[Evaluation, Evaluation] | None:
        """The first and the last evaluation, if both can be read and are of the same prompts."""
        first = next((found for update in self.updates() if (found := self.load(update)) is not None), None)
        last = next((found for update in reversed(self.updates()) if (found := self.load(update)) is not None), None)
        if first is None or last is None or len(self.updates()) < 2 or asked(first.prompts) != asked(last.prompts):
            return None
        return first, last

    def remove_after(self, update: int) -> None:
        """Remove what later updates left."""
        for path, number in self._files():
            if number > update:
                path.unlink()

    def move_after(self, update: int, to: Path) -> None:
        """Move what later updates left into another folder."""
        for path, number in self._files():
            if number > update:
                to.mkdir(parents=True, exist_ok=True)
                path.rename(to / path.name)

    def of_other_prompts(self, prompts: Sequence[Prompt]) -> bool:
        """Whether the last one that can be read asked for something else."""
        last = next((found for update in reversed(self.updates()) if (found := self.load(update)) is not None), None)
        return last is not None and asked(last.prompts) != asked(prompts)

    def _files(self) -> list[tuple[Path, int]]:
        named = ((path, re.fullmatch(r"update-([0-9]{1,18})", path.stem)) for path in self.folder.glob("update-*"))
        return [(path, int(name[1])) for path, name in named if name and path.suffix in (".json", ".pt")]

    def _path(self, update: int, ending: str) -> Path:
        return self.folder / f"update-{update:06d}.{ending}"


def _warn(path: Path, error: Exception) -> None:
    reason = (str(error).splitlines() or [""])[0] or repr(error)
    if not path.exists():
        logger.warning("%s is not there; the run goes on without it", path)
        return
    logger.warning("%s cannot be read (%s) and is set aside as %s", path, reason, set_aside(path).name)


def _evaluation(kept: dict[str, Any], record: Path) -> Evaluation:
    """What ``save`` wrote; the first versions wrote the prompts into the record alone.

    Raises:
        Exception: of some kind, if it is not what ``save`` writes.
    """
    if "prompts" in kept:
        rows = kept["prompts"]
    else:
        rows = [(row["text"], row["words"], row["label"]) for row in json.loads(record.read_bytes())["per_prompt"]]
    prompts = [Prompt(str(text), tuple(map(str, words)), label=label) for text, words, label in rows]
    images, texts, made_by = kept["images"], kept["texts"], dict(kept["made_by"])
    columns = {name: None if kept[name] is None else kept[name].numpy() for name in ("rewards", "hits", "neds")}
    shaped = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    lengths = {len(values) for values in (images, texts, *columns.values()) if values is not None}
    good = texts is None or all(isinstance(text, str) for text in texts)
    if not shaped or not good or lengths != {len(prompts)} or columns["rewards"] is None:
        raise ValueError("it does not hold what an evaluation holds")
    return Evaluation(prompts, 1, images, texts, columns["rewards"], columns["hits"], columns["neds"], made_by)


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
