"""What a run leaves on disk: its configuration, metrics, pictures, evaluations, checkpoints and finished weights."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

import varl
from varl.config import TrainConfig
from varl.evaluation.held_out import Evaluation
from varl.models import save_policy
from varl.policy import Policy, Prompt
from varl.run.checkpoint import Checkpoints
from varl.run.gallery import save_before_after, save_gallery
from varl.run.metrics import MetricsWriter
from varl.schedule import ScaleSchedule

if TYPE_CHECKING:
    from varl.rewards import RewardOutput

__all__ = ["RunFolder", "plain"]

_MAY_CHANGE = {
    "run": ("out", "updates", "device", "threads", "save_every", "keep", "gallery_every", "diagnose_every"),
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
    """The folder of one run.

    Args:
        main: whether this process writes it; others only read its checkpoints.

    Raises:
        ValueError: if the folder holds a run of another configuration; nothing is overwritten.
    """

    metrics: MetricsWriter

    def __init__(self, config: TrainConfig, main: bool = True) -> None:
        self.path = config.run.out
        if main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim(plain(asdict(config)))
            self.metrics = MetricsWriter(self.path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.run.keep)

    def _claim(self, config: dict[str, Any]) -> None:
        file = self.path / "config.yaml"
        if file.exists():
            earlier = yaml.safe_load(file.read_text())["config"]
            changed = _differences(_fixed(earlier), _fixed(config))
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}); "
                    "choose another --run.out, or the earlier settings to go on with it"
                )
        machine = {"platform": platform.platform(), "python": platform.python_version()}
        machine["torch"] = str(torch.__version__)
        text = yaml.safe_dump({"varl": varl.__version__, "machine": machine, "config": config}, sort_keys=False)
        beside = file.with_suffix(".partial")
        beside.write_text(text)
        os.replace(beside, file)

    def micro_batches(self) -> dict[str, int]:
        """Measured numbers of sequences a pass, by kind of update."""
        path = self.path / "micro_batches.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note_micro_batches(self, sizes: dict[str, int]) -> None:
        """Keep them for when the run is gone on with."""
        path = self.path / "micro_batches.json"
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(sizes))
        os.replace(beside, path)

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
        path = self.path / "gallery" / f"update-{update:06d}.png"
        path.parent.mkdir(exist_ok=True)
        save_gallery(path, prompts, images, output.score[:count], advantages, texts, masks, schedule)

    def evaluation(self, update: int, pictures: int, result: Evaluation) -> None:
        """Note a held-out evaluation, with its pictures; once there are two, draw the first beside this one."""
        folder = self.path / "evaluations"
        folder.mkdir(exist_ok=True)
        record = {"update": update, "training_pictures": pictures, **result.to_dict()}
        (folder / f"update-{update:06d}.json").write_text(json.dumps(record, indent=1))
        kept = {name: getattr(result, name) for name in ("images", "texts", "made_by")}
        kept |= {name: _tensor(getattr(result, name)) for name in ("rewards", "hits", "neds")}
        torch.save(kept, folder / f"update-{update:06d}.pt")
        before = self.results(result.prompts)[0]
        if update and before.texts is not None and result.texts is not None:
            shown = slice(0, 16)
            path = self.path / "before_after.png"
            pictures_of = before.images[shown], result.images[shown]
            save_before_after(path, result.prompts[shown], *pictures_of, before.texts[shown], result.texts[shown])

    def results(self, prompts: Sequence[Prompt]) -> list[Evaluation]:
        """All evaluations noted so far, in order of updates; ``prompts`` are those they were made with."""
        found = []
        for file in sorted((self.path / "evaluations").glob("update-*.pt")):
            kept = torch.load(file, weights_only=True)
            hits, neds = (None if kept[name] is None else kept[name].numpy() for name in ("hits", "neds"))
            rewards = kept["rewards"].numpy()
            found.append(
                Evaluation(list(prompts), 1, kept["images"], kept["texts"], rewards, hits, neds, kept["made_by"])
            )
        return found

    def finish(self, policy: Policy) -> Path:
        """Write the finished weights in the family's own format."""
        path = self.path / "weights.safetensors"
        save_policy(policy, path)
        return path


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


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
