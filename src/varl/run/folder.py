"""What a run leaves on disk: its configuration, metrics, pictures, evaluations, checkpoints and finished weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

import varl
from varl.config import TrainConfig
from varl.errors import RunError
from varl.evaluation.alarm import falling_metrics
from varl.evaluation.held_out import Evaluation, paired_difference
from varl.policy import Prompt
from varl.recipes import read_yaml
from varl.run.checkpoint import Checkpoints
from varl.run.evaluations import Evaluations
from varl.run.files import FolderLock, beside, free_name, need_file, need_folder, replacing, set_aside, writing
from varl.run.gallery import save_before_after, save_gallery
from varl.run.metrics import MetricsWriter, read_metrics
from varl.run.progress import FINISHED, Progress, note_start
from varl.schedule import ScaleSchedule

if TYPE_CHECKING:
    from varl.rewards import RewardOutput

__all__ = ["RunFolder", "plain"]

logger = logging.getLogger(__name__)

_FILES = ("config.yaml", "metrics.jsonl", "starts.jsonl", "progress.json", "micro_batches.json", "before_after.png")
_FOLDERS = {"evaluations": ("*.json", "*.pt"), "gallery": ("*.png",), "checkpoints": ()}
"""What a run writes, beside ``FINISHED``: files, and folders with patterns of the files in them."""

_MAY_CHANGE = {
    "run": (
        *("out", "updates", "device", "threads", "deterministic", "save_every", "keep"),
        *("gallery_every", "diagnose_every", "max_failed_share", "failure_window"),
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

    Attributes:
        identity: a hash of all settings that decide the run's numbers.

    Raises:
        ValueError: if another process holds it, it holds a run of another configuration, or work without a checkpoint
            to go on from; nothing is changed.
        RunError: if it cannot be written.
    """

    metrics: MetricsWriter

    def __init__(self, config: TrainConfig, main: bool = True, patience: float = 0.0) -> None:
        self.path, self._config = config.run.out, plain(asdict(config))
        self.identity = _identity(self._config)
        self._fold = not isinstance(config.reward, dict) or config.reward.get("fold") not in (False, "false")
        self._progress, self._evaluations = Progress(self.path), Evaluations(self.path / "evaluations")
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.run.keep, self._progress.note)
        self._lock = FolderLock(self.path, patience) if main else None
        try:
            if main:
                self._check(self._config)
                self.metrics = MetricsWriter(self.path)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

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

    def _check(self, config: dict[str, Any]) -> None:
        """Refuse a folder whose work would be lost, before anything in it is changed."""
        self._check_kinds()
        file = self.path / "config.yaml"
        if file.exists():
            try:
                kept = read_yaml(file)
                earlier = kept.get("config") if isinstance(kept, dict) else None
                if not isinstance(earlier, dict):
                    raise ValueError("it has no configuration under 'config'")
            except ValueError as error:
                raise ValueError(f"{file} is not as a run wrote it ({error}); choose another --run.out") from error
            changed = _differences(_fixed(earlier), _fixed(config))
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}); "
                    "choose another --run.out, or the earlier settings to go on with it"
                )
        found = [] if self.checkpoints.paths() else self._progress.evidence()
        if found:
            raise ValueError(
                f"{self.path} holds {', '.join(found)}, but no checkpoint to go on from: a run that began here would "
                f"overwrite them. Choose another --run.out, put {self.checkpoints.folder} back, or move the folder "
                "away to begin again"
            )

    def _check_kinds(self) -> None:
        """Refuse a folder where a file belongs, a pipe, and the like, which would end the run late, or never."""
        try:
            for name in (*_FILES, *FINISHED):
                need_file(self.path / name)
                need_file(beside(self.path / name))
            for name, patterns in _FOLDERS.items():
                need_folder(self.path / name)
                for path in (path for pattern in patterns for path in (self.path / name).glob(pattern)):
                    need_file(path)
        except ValueError as error:
            raise ValueError(f"{error}, or choose another --run.out") from error

    def begin(self, update: int, held_out: Sequence[Prompt] = ()) -> None:
        """Note what the run begins or goes on with, and drop what later updates left behind.

        What a later checkpoint had covered, which is gone or cannot be used, is kept in a folder of its own; so are
        evaluations of other prompts than are now held out.
        """
        with replacing(self.path / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump({"varl": varl.__version__, "config": self._config}, sort_keys=False))
        if (newest := self._progress.newest()) > update:
            self._keep_later(update, newest)
        self._progress.note(update)
        note_start(self.path / "starts.jsonl", update)
        self.metrics.truncate_after(update)
        self._evaluations.remove_after(update)
        if held_out and self._evaluations.of_other_prompts(held_out):
            to = self._kept_apart(f"other-held-out-prompts-{update:06d}")
            self._evaluations.move_after(-1, to / "evaluations")
            self._keep("best.safetensors", "before_after.png", to=to)
            logger.warning(
                "the held-out prompts are others than before: what was measured on those is kept in %s and is "
                "compared with nothing that follows",
                to,
            )

    def name_removed(self, evaluated: int | None, best: tuple[int, float] | None) -> list[bool]:
        """Warn of what evaluations had left and is gone.

        Args:
            evaluated: the update of the last evaluation.
            best: the update and the score of the best one.

        Returns:
            Whether no evaluation is left, so that a new baseline is due; and whether the best weights are nowhere left.
        """
        file, no_best, none_left = self.path / "best.safetensors", False, False
        if best is not None and not file.exists():
            same = self.checkpoints.folder / f"update-{best[0]:06d}"
            no_best = not same.exists()
            then = "the next evaluation's take its place" if no_best else f"{same} has them; better ones are written"
            logger.warning("%s, the best weights so far, of update %d, is not there; %s", file, best[0], then)
        if evaluated is not None:
            none_left = not self.evaluated()
            then = "the prompts are evaluated anew, as a new baseline" if none_left else "the run goes on without it"
            where = self._evaluations.folder
            if not any(where.glob(f"update-{evaluated:06d}.pt*")):  # one that is .damaged was named before
                logger.warning("the evaluation after update %d is not in %s; %s", evaluated, where, then)
        return [none_left, no_best]

    def _keep_later(self, update: int, newest: int) -> None:
        to = self._kept_apart(f"later-than-update-{update:06d}")
        with writing(to):
            self._evaluations.move_after(update, to / "evaluations")
        self._keep("metrics.jsonl", *FINISHED, to=to)
        logger.warning(
            "the checkpoint of update %d cannot be gone on from, only that of update %d: what was written since is "
            "kept in %s",
            newest,
            update,
            to,
        )

    def _kept_apart(self, name: str) -> Path:
        folder = free_name(self.path / name)
        with writing(folder):
            folder.mkdir()
        return folder

    def _keep(self, *names: str, to: Path) -> None:
        """Files as they are now, whatever takes their place: what replaces a file leaves its other links alone."""
        for name in names:
            if (self.path / name).exists():
                with writing(to / name):
                    try:
                        os.link(self.path / name, to / name)
                    except OSError:  # a file system without links
                        shutil.copy2(self.path / name, to / name)

    def micro_batches(self) -> dict[str, int]:
        """Measured numbers of sequences a pass, by kind of update."""
        path = self.path / "micro_batches.json"
        try:
            sizes = json.loads(path.read_bytes()) if path.exists() else {}
            if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
                raise ValueError("it holds no positive numbers by name")
            return sizes
        except (ValueError, RecursionError) as error:
            if self._lock is not None:
                kept = set_aside(path).name
                logger.warning("%s cannot be read (%s), is kept as %s, and measured anew", path, error, kept)
            return {}

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
            save_gallery(
                partial, prompts, images, output.score[:count], advantages, texts, masks, schedule, fold=self._fold
            )

    def evaluation(self, update: int, pictures: int, result: Evaluation, window: int) -> None:
        """Note a held-out evaluation, with its pictures; once there are two, draw the first beside this one.

        Args:
            window: warn of reward hacking if it shows over so many evaluations; 0 is never.
        """
        falling = self._falling(update, result, window)
        self._evaluations.save(update, result, {"training_pictures": pictures, "alarm": falling})
        pair = self._evaluations.pair() if update else None
        if pair is None or pair[0].texts is None or pair[1].texts is None:
            return
        before, after = pair
        shown = slice(0, 16)
        with replacing(self.path / "before_after.png") as partial:
            save_before_after(
                partial,
                after.prompts[shown],
                before.images[shown],
                after.images[shown],
                pair[0].texts[shown],
                pair[1].texts[shown],
                fold=self._fold,
            )

    def _falling(self, update: int, result: Evaluation, window: int) -> list[str]:
        """The held-out metrics that fell over the last evaluations while the training reward rose."""
        earlier = [number for number in self.evaluated() if number < update]
        if not window or len(earlier) + 1 < window:
            return []
        first = earlier[1 - window]
        before = self._evaluations.load(first)
        if before is None:
            return []
        changes = {}
        for name in set(before.metrics) & set(result.metrics):
            with suppress(ValueError):  # no prompt could be scored in both, or the prompts are others
                changes[name] = paired_difference(before, result, name)
        # Each kind for itself: prefixes and suffixes may be valued on other scales, or unequally often.
        scores: dict[str, list[float]] = {}
        for line in read_metrics(self.path):
            if first < line["update"] <= update:
                scores.setdefault(line.get("kind", ""), []).append(_score(line))
        falling = next(filter(None, (falling_metrics(own, changes) for own in scores.values())), [])
        if falling:
            logger.warning(
                "since update %d the training reward rises while held-out %s falls: is the reward being hacked?",
                first,
                ", ".join(falling),
            )
        return falling

    def hacked(self, stops: bool) -> RunError | None:
        """What to stop with if the last evaluation raised the alarm, and that is to stop the run."""
        evaluated = self.evaluated() if stops and self._lock is not None else []
        falling = self._evaluations.alarm(evaluated[-1]) if evaluated else []
        if not falling:
            return None
        return RunError(
            f"the training reward rises while held-out {', '.join(falling)} falls: the reward is hacked. The best "
            f"weights are in {self.path / 'best.safetensors'}; --evaluation.alarm_stops false goes on regardless"
        )

    def evaluated(self) -> list[int]:
        """After how many updates there were evaluations, in order."""
        return self._evaluations.updates()

    def result(self, update: int) -> Evaluation | None:
        """The evaluation after so many updates, or None if its file is damaged."""
        return self._evaluations.load(update)

    def before_after(self) -> tuple[Evaluation, Evaluation] | None:
        """The first and the last evaluation, if there are two of the same prompts."""
        return self._evaluations.pair()

    def export(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write finished weights or adapters in one go, by a function of the path to write to."""
        path = self.path / name
        with replacing(path) as partial:
            write(partial)
        return path


def _score(line: dict[str, Any]) -> float:
    """The mean reward that a line of the metrics tells, or NaN."""
    parts = line.get("reward")
    score = parts.get("score") if isinstance(parts, dict) else None
    return float(score) if isinstance(score, int | float) else math.nan


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    sections = {}
    for section, values in config.items():
        drop = _MAY_CHANGE.get(section, ())
        sections[section] = {k: v for k, v in values.items() if k not in drop} if isinstance(values, dict) else values
    return sections


def _identity(config: dict[str, Any]) -> str:
    """A hash of the settings that decide an update's numbers, but for files: of those it is the content that counts."""
    fixed = _fixed(config)
    for section, name in (("policy", "weights"), ("policy", "adapters"), ("prompts", "source")):
        fixed[section].pop(name)
    return hashlib.sha256(json.dumps(fixed | {"evaluation": None}, sort_keys=True).encode()).hexdigest()


def _differences(earlier: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = sorted(earlier.keys() | now.keys(), key=str)
        return [d for key in keys for d in _differences(earlier.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if earlier == now else [f"{path} was {earlier!r}, is now {now!r}"]
