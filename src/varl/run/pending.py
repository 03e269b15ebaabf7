"""What one update leaves for the next: pictures that a suffix update reuses, as tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varl import updates
from varl.rewards import RewardOutput
from varl.rollout import Rollout

if TYPE_CHECKING:
    from varl.trainer import Sampled, Trainer

__all__ = ["pending_pictures", "restored_pictures"]


def pending_pictures(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The pictures that the next update reuses: tensors by name, and values for JSON; None if it draws its own."""
    kept = trainer.kept
    if kept is None or updates.kind_of_update(trainer.config.method, trainer.update) != "suffix":
        return {}, None
    output, number = kept.output, {id(prompt): i for i, prompt in enumerate(trainer.stream.prompts)}
    tensors = {"actions": kept.drawn.whole.actions, "images": kept.images}
    tensors |= {"score": output.score, "failed": output.failed}
    tensors |= {f"parts.{name}": value for name, value in output.parts.items()}
    # One prompt of each group: encoded in the same batch as before, they give the same bits.
    per_prompt = len(kept.shown) // trainer.config.method.prompts
    shown = [number[id(prompt)] for prompt in kept.shown[::per_prompt]]
    values: dict[str, Any] = {"prompts": shown, "per_prompt": per_prompt, "texts": output.texts, "points": None}
    if output.regions is not None:
        polygons = [np.asarray(polygon, np.float64) for regions in output.regions for polygon in regions]
        tensors["regions"] = torch.from_numpy(np.concatenate([np.zeros((0, 2)), *polygons]))
        values["points"] = [[len(polygon) for polygon in regions] for regions in output.regions]
    return tensors, values


def restored_pictures(trainer: Trainer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Sampled:
    """What ``pending_pictures`` gave, as the trainer holds it: of several processes, each its share."""
    from varl.trainer import Sampled

    prompts = [trainer.stream.prompts[i] for i in values["prompts"]]
    shown = [prompt for prompt in prompts for _ in range(values["per_prompt"])]
    with trainer.distributed.gathered(trainer.policy):
        condition = trainer.policy.condition(prompts, trainer.schedule).repeat(values["per_prompt"])
    mine = trainer.distributed.share(len(shown))
    own = slice(mine.start, mine.stop)
    tensors = {name: value if name == "regions" else value[own] for name, value in tensors.items()}
    actions = tensors["actions"].to(trainer.device)
    whole = Rollout(condition.select(mine), actions, len(trainer.schedule), guidance=trainer.config.sampling.guidance)
    regions = None
    if values["points"] is not None:
        points = iter(tensors["regions"].numpy())
        regions = [[np.array([next(points) for _ in range(count)]) for count in of] for of in values["points"]][own]
    parts = {name.removeprefix("parts."): value for name, value in tensors.items() if name.startswith("parts.")}
    texts = None if values["texts"] is None else values["texts"][own]
    output = RewardOutput(tensors["score"], tensors["failed"], regions, parts, texts)
    return Sampled(shown[own], updates.Drawn(whole, whole), tensors["images"], output, None)
