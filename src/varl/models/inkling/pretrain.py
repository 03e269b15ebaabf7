"""Pretraining of Inkling in two stages, on pictures drawn on the fly: the tokenizer, then the transformer.

Both stages draw batch ``i`` from (seed, stage, i) alone, so a run that was stopped at any moment goes on to the same
numbers from its last checkpoint.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.inkling.pictures import draw
from varl.models.inkling.policy import Inkling, InklingConfig
from varl.models.inkling.text import PICTURE, make_prompt, random_regions
from varl.models.inkling.tokenizer import code_bounds
from varl.policy import Prompt
from varl.run.files import need_file, writing
from varl.run_config import expand, need, need_counts, need_seeds

__all__ = ["FINISHED", "PretrainConfig", "StageConfig", "check_folder", "pretrain", "sample_batch"]

CHECKPOINT, FINISHED = "pretrain.pt", "inkling.safetensors"
"""Files of the folder."""


@dataclass(frozen=True)
class StageConfig:
    """One stage, optimised by AdamW with a warm-up and a cosine decay to a tenth.

    Attributes:
        steps: its length.
        batch: pictures a step.
        learning_rate: the highest.
        warmup: steps until then.
        horizon: steps over which the rate decays; by default all. A longer one leaves a stage off early.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 50
    horizon: int | None = None

    def __post_init__(self) -> None:
        need_counts(self, "batch")
        for name, least in (("steps", 0), ("warmup", 1), ("horizon", 1)):
            value = getattr(self, name)
            need(value is None or value >= least, f"{name} of a stage must be {least} or more, got {value}")
        rate = self.learning_rate
        need(0 < rate < math.inf, f"learning_rate of a stage must be positive and finite, got {rate}")


@dataclass(frozen=True)
class PretrainConfig:
    """What ``varl pretrain`` needs.

    Attributes:
        out: folder for checkpoints and the finished ``inkling.safetensors``.
        model: the shape of the model.
        tokenizer: the first stage.
        transformer: the second stage.
        drop_condition: share of samples whose condition is replaced by the null one, for guidance.
        last_grid_every: the last grid, by far the largest, is trained in every n-th step only.
        save_every: seconds between checkpoints.
        device: ``cpu`` or ``cuda``.
        seed: of everything random.
    """

    out: Path = Path("runs/inkling-pretrain")
    model: InklingConfig = field(default_factory=InklingConfig)
    tokenizer: StageConfig = field(default_factory=lambda: StageConfig(1000, 32, 2e-3))
    transformer: StageConfig = field(default_factory=lambda: StageConfig(200, 48, 1.5e-3, horizon=1200))
    drop_condition: float = 0.1
    last_grid_every: int = 3
    save_every: float = 60.0
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        expand(self, "out")
        need_seeds(self, "seed")
        need(0 <= self.drop_condition <= 1, f"drop_condition must be a share from 0 to 1, got {self.drop_condition}")
        need(self.last_grid_every >= 1, f"last_grid_every must be 1 or more, got {self.last_grid_every}")
        need(0 <= self.save_every < math.inf, f"save_every must be 0 or more seconds, got {self.save_every}")
        self._check_fit()

    def _check_fit(self) -> None:
        """Refuse a shape whose tokenizer cannot be fitted to pictures."""
        shape, steps = self.model, len(self.model.grids)
        cell = PICTURE // shape.grids[-1]
        patch = cell * (shape.grids[-1] // shape.grids[-2])
        for name, side in (("coarse", patch), ("fine", cell)):
            asked, most = getattr(shape, name), 3 * side**2
            fits = f"of grids {list(shape.grids)} have {most} numbers a patch"
            need(asked <= most, f"model.{name} asks for {asked} components, but pictures {fits}: at most {most}")
        bounds = code_bounds(shape.codes, steps)
        fewest = min(after - before for before, after in pairwise(bounds))
        need(
            fewest > 0, f"model.codes {shape.codes} are too few for {steps} grids, each of which takes some of its own"
        )
        need(shape.decoder > 1, f"model.decoder must be at least 2 channels, got {shape.decoder}")


def sample_batch(seed: tuple[int, ...], size: int, held_out: bool = False) -> tuple[Tensor, list[Prompt]]:
    """Random pictures [size, 3, 48, 48] in [0, 1] and the prompts that ask for them, from a seed."""
    rng = np.random.default_rng(seed)
    regions = [random_regions(rng, held_out) for _ in range(size)]
    return torch.from_numpy(np.stack([draw(r, rng) for r in regions])), [make_prompt(r) for r in regions]


def tokenizer_loss(policy: Inkling, images: Tensor, last: int) -> Tensor:
    """Picture error of the sum of the steps up to ``last``, plus a quarter of the feature error after every step."""
    tokenizer = policy.tokenizer
    total, feature_error = tokenizer.empty(len(images)), images.new_zeros(())
    steps = range(last + 1)
    for step in steps:
        with torch.no_grad():
            target = tokenizer.target(images, total, step)
            actions = tokenizer.choose(images, total, step)
        added = tokenizer.quantizer.contribution(actions, step)
        feature_error = feature_error + F.mse_loss(added, target)
        total = total + added
    return F.mse_loss(tokenizer.picture(total), images) + 0.25 * feature_error / len(steps)


def transformer_loss(policy: Inkling, images: Tensor, prompts: list[Prompt], steps: range, drop: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens of ``steps``; rows where ``drop`` is true get the null condition."""
    actions = policy.encode(images)
    condition = policy.condition(prompts)
    cells = condition.features["cells"]
    condition.features["cells"] = torch.where(drop[:, None, None], condition.null["cells"], cells)
    logits = policy.logits(policy.hidden(condition, actions, steps))
    return F.cross_entropy(logits.flatten(0, 1), actions[:, policy.default_schedule.span(steps)].flatten())


Progress = Callable[[str, int, int, float], None]
"""Called as progress(stage, step, steps, loss)."""


class _Stage:
    """The optimizer loop that both stages share."""

    def __init__(self, name: str, config: StageConfig, module: torch.nn.Module, decay: float) -> None:
        self.name, self.config, self.module, self.step = name, config, module, 0
        fused = next(module.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(
            module.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=fused
        )

    def rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        return (
            self.config.learning_rate
            * warm
            * (0.55 + 0.45 * math.cos(math.pi * self.step / (self.config.horizon or self.config.steps)))
        )

    def update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _save(path: Path, data: dict[str, Any]) -> None:
    with writing(path):
        torch.save(data, _partial(path))
        os.replace(_partial(path), path)


def check_folder(config: PretrainConfig) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None; makes the folder if it is not there.

    Raises:
        ValueError: if the checkpoint cannot be read or was made with another configuration, or there is none beside
            finished weights, which a new run would overwrite.
    """
    path, finished = config.out / CHECKPOINT, config.out / FINISHED
    need(config.out.is_dir() or not config.out.exists(), f"out must be a folder, but {config.out} is a file")
    config.out.mkdir(parents=True, exist_ok=True)
    need_file(path)
    need_file(_partial(path))
    if not path.exists():
        need(
            not finished.exists(),
            f"{finished} is there, but no {CHECKPOINT} to go on from: a run would overwrite it; choose another --out, "
            "or move it away",
        )
        return None
    try:
        data = torch.load(path, map_location=config.device, weights_only=True)
        identity = data["identity"]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or repr(error)
        raise ValueError(f"{path} cannot be read ({reason}); move it away to begin again") from error
    if identity != _identity(config):
        raise ValueError(f"{path} was made with another configuration; choose another --out or remove it")
    return dict(data)


def pretrain(config: PretrainConfig, progress: Progress = lambda *_: None) -> Inkling:
    """Run both stages, or what is left of them.

    Raises:
        ValueError: as ``check_folder``.
        RunError: if a checkpoint cannot be written.
    """
    data = check_folder(config)
    torch.manual_seed(config.seed)
    policy = Inkling(config.model).to(config.device)
    policy.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stages = {
        "tokenizer": _Stage("tokenizer", config.tokenizer, policy.tokenizer, 0.0),
        "transformer": _Stage("transformer", config.transformer, policy.transformer, 0.05),
    }
    checkpoint, identity = config.out / CHECKPOINT, _identity(config)
    if data is not None:
        policy.load_state_dict(data["policy"])
        for name, stage in stages.items():
            stage.load(data[name])
    else:
        images, _ = sample_batch((config.seed, 2), 1024)
        policy.tokenizer.fit(images.to(config.device), torch.Generator().manual_seed(config.seed))

    last_save = time.monotonic()
    for index, stage in enumerate(stages.values()):
        while stage.step < stage.config.steps:
            loss = _loss(policy, config, index, stage)
            stage.update(loss)
            progress(stage.name, stage.step, stage.config.steps, loss.item())
            if time.monotonic() - last_save > config.save_every or stage.step == stage.config.steps:
                state = {name: s.state() for name, s in stages.items()}
                _save(checkpoint, {"identity": identity, "policy": policy.state_dict(), **state})
                last_save = time.monotonic()
    return policy


def _identity(config: PretrainConfig) -> str:
    kept = {k: v for k, v in asdict(config).items() if k not in ("out", "save_every", "device")}
    return repr(sorted(kept.items()))


def _loss(policy: Inkling, config: PretrainConfig, index: int, stage: _Stage) -> Tensor:
    images, prompts = sample_batch((config.seed, index, stage.step), stage.config.batch)
    images = images.to(config.device).contiguous(memory_format=torch.channels_last)
    steps = len(policy.default_schedule)
    if stage.name == "tokenizer":
        return tokenizer_loss(policy, images, steps - 1 - stage.step // 2 % 2)
    whole = stage.step % config.last_grid_every == 0
    rng = np.random.default_rng((config.seed, 3, stage.step))
    drop = torch.from_numpy(rng.random(len(images)) < config.drop_condition).to(config.device)
    return transformer_loss(policy, images, prompts, range(steps if whole else steps - 1), drop)
