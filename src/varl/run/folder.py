"""What a run leaves on disk: its configuration, metrics, pictures, evaluations, checkpoints and finished weights."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

import varl
from varl.config import TrainConfig
from varl.errors import RunError
from varl.evaluation.alarm import falling_metrics
from varl.evaluation.held_out import Evaluation, paired_difference
from varl.policy import Prompt
from varl.run.checkpoint import Checkpoints
from varl.run.environment import changed_versions, environment
from varl.run.files import FolderLock, replacing, writing
from varl.run.gallery import save_before_after, save_gallery
from varl.run.metrics import MetricsWriter, read_metrics
from varl.schedule import ScaleSchedule

if TYPE_CHECKING:
    from varl.rewards import RewardOutput

__all__ = ["RunFolder", "plain"]

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    "run": (
        *("out", "updates", "device", "threads", "save_every", "keep", "gallery_every", "diagnose_every"),
        *("max_failed_share", "failure_window"),
    ),
    "evaluation": ("alarm_window", "alarm_stops"),
    "parallel": ("mode", "cpu_offload", "timeout"),
}
"""Settings that may differ between a run and its continuation: none of them changes an update's numbers."""


def plain(value: Any) -> Any:
    """A configuration as plain values that YAML and JSON hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class RunFolder:
    """The folder of one run, held by one process until ``close()`` or the process's end.

    Args:
        main: whether this process writes it; others only read its checkpoints.
        patience: seconds to wait for a process that holds it, before that is an error.

    Raises:
        ValueError: if another process holds it, or it holds a run of another configuration; nothing is overwritten.
        RunError: if it cannot be written.
    """

    metrics: MetricsWriter

    def __init__(self, config: TrainConfig, main: bool = True, patience: float = 0.0) -> None:
        self.path = config.run.out
        self._lock = FolderLock(self.path, patience) if main else None
        try:
            if main:
                self._claim(plain(asdict(config)))
                self.metrics = MetricsWriter(self.path)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.run.keep)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for a checkpoint that is being written, and let go of the folder."""
        self.checkpoints.close()
        if self._lock is not None:
            self.metrics.close()
            self._lock.release()

    def _claim(self, config: dict[str, Any]) -> None:
        file = self.path / "config.yaml"
        if file.exists():
            try:
                earlier = _fixed(dict(yaml.safe_load(file.read_text())["config"]))
            except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is not as a run wrote it ({error}); choose another --run.out") from error
            changed = _differences(earlier, _fixed(config))
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}); "
                    "choose another --run.out, or the earlier settings to go on with it"
                )
        with replacing(file) as partial:
            partial.write_text(yaml.safe_dump({"varl": varl.__version__, "config": config}, sort_keys=False))

    def begin(self, update: int) -> None:
        """Note in ``starts.jsonl`` with what the run begins or goes on, and drop what later updates left behind."""
        file, now = self.path / "starts.jsonl", environment()
        if update and file.exists():
            changed = changed_versions(_last_line(file), now)
            if changed:
                logger.warning("not the versions this run had before: %s; its numbers may differ", "; ".join(changed))
        with writing(file), file.open("a", encoding="utf-8") as lines:
            start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "from_update": update, **now}
            lines.write(json.dumps(start) + "\n")
        self.metrics.truncate_after(update)
        for left in (self.path / "evaluations").glob("update-*"):
            if _update_of(left) > update:
                left.unlink()

    def micro_batches(self) -> dict[str, int]:
        """Measured numbers of sequences a pass, by kind of update."""
        path = self.path / "micro_batches.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note_micro_batches(self, sizes: dict[str, int]) -> None:
        """Keep them for when the run is gone on with."""
        path = self.path / "micro_batches.json"
        with replacing(path) as partial:
            partial.write_text(json.dumps(sizes))

    def gallery(
        self,
        update: int,
        prompts: Sequence[Prompt],
        images: Tensor,
        output: RewardOutput,
        advantages: Tensor,
        masks: Tensor | None,
        schedule: ScaleSchedule,
    ) -> None:
        """Pictures of samples with their rewards and propagated masks."""
        count = len(images)
        texts = None if output.texts is None else output.texts[:count]
        with replacing(self.path / "gallery" / f"update-{update:06d}.png") as partial:
            save_gallery(partial, prompts, images, output.score[:count], advantages, texts, masks, schedule)

    def evaluation(self, update: int, pictures: int, result: Evaluation, window: int) -> None:
        """Note a held-out evaluation, with its pictures; once there are two, draw the first beside this one.

        Args:
            window: warn of reward hacking if it shows over so many evaluations; 0 is never.
        """
        falling = self._falling(update, result, window)
        record = {"update": update, "training_pictures": pictures, "alarm": falling, **result.to_dict()}
        kept = {name: getattr(result, name) for name in ("images", "texts", "made_by")}
        kept |= {name: _tensor(getattr(result, name)) for name in ("rewards", "hits", "neds")}
        with replacing(self._evaluation(update, "json")) as partial:
            partial.write_text(json.dumps(record, indent=1))
        torch.save(kept, buffer := io.BytesIO())  # to a file, it would say nothing of a full disk but where it was
        with replacing(self._evaluation(update, "pt")) as partial:
            partial.write_bytes(buffer.getbuffer())
        before = self.result(self.evaluated()[0], result.prompts)
        if update and before.texts is not None and result.texts is not None:
            shown = slice(0, 16)
            pictures_of = before.images[shown], result.images[shown]
            with replacing(self.path / "before_after.png") as partial:
                save_before_after(
                    partial, result.prompts[shown], *pictures_of, before.texts[shown], result.texts[shown]
                )

    def _falling(self, update: int, result: Evaluation, window: int) -> list[str]:
        """The held-out metrics that fell over the last evaluations while the training reward rose."""
        earlier = [number for number in self.evaluated() if number < update]
        if not window or len(earlier) + 1 < window:
            return []
        first = earlier[1 - window]
        before = self.result(first, result.prompts)
        changes = {}
        for name in set(before.metrics) & set(result.metrics):
            with suppress(ValueError):  # no prompt could be scored in both
                changes[name] = paired_difference(before, result, name)
        lines = [line for line in read_metrics(self.path) if first < line["update"] <= update]
        scores = [line["reward"]["score"] for line in lines]
        falling = falling_metrics([math.nan if score is None else score for score in scores], changes)
        if falling:
            logger.warning(
                "since update %d the training reward rises while held-out %s falls: is the reward being hacked?",
                first,
                ", ".join(falling),
            )
        return falling

    def hacked(self, stops: bool) -> RunError | None:
        """What to stop with if the last evaluation raised the alarm, and that is to stop the run."""
        evaluated = self.evaluated() if stops else []
        if not evaluated:
            return None
        falling = json.loads(self._evaluation(evaluated[-1], "json").read_text())["alarm"]
        if not falling:
            return None
        return RunError(
            f"the training reward rises while held-out {', '.join(falling)} falls: the reward is hacked. The best "
            f"weights are in {self.path / 'best.safetensors'}; --evaluation.alarm_stops false goes on regardless"
        )

    def evaluated(self) -> list[int]:
        """After how many updates there were evaluations, in order."""
        return sorted(_update_of(file) for file in (self.path / "evaluations").glob("update-*.pt"))

    def result(self, update: int, prompts: Sequence[Prompt]) -> Evaluation:
        """The evaluation after so many updates; ``prompts`` are those it was made with."""
        kept = torch.load(self._evaluation(update, "pt"), weights_only=True)
        hits, neds = (None if kept[name] is None else kept[name].numpy() for name in ("hits", "neds"))
        rewards = kept["rewards"].numpy()
        return Evaluation(list(prompts), 1, kept["images"], kept["texts"], rewards, hits, neds, kept["made_by"])

    def _evaluation(self, update: int, ending: str) -> Path:
        return self.path / "evaluations" / f"update-{update:06d}.{ending}"

    def export(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write finished weights or adapters in one go, by a function of the path to write to."""
        path = self.path / name
        with replacing(path) as partial:
            write(partial)
        return path


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def _update_of(file: Path) -> int:
    return int(file.stem.removeprefix("update-"))


def _last_line(file: Path) -> dict[str, Any]:
    """The last line that can be read; one half written is passed over."""
    for line in reversed(file.read_text(encoding="utf-8").splitlines()):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    sections = {}
    for section, values in config.items():
        drop = _MAY_CHANGE.get(section, ())
        sections[section] = {k: v for k, v in values.items() if k not in drop} if isinstance(values, dict) else values
    return sections


def _differences(earlier: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted(earlier.keys() | now.keys(), key=str)
        return [d for key in keys for d in _differences(earlier.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if earlier == now else [f"{path} was {earlier!r}, is now {now!r}"]
