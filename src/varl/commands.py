"""What each command does; ``varl.cli`` parses for them. Those that do not train are in ``varl.policy_commands``."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from varl.config import TrainConfig
from varl.console import console, progress_bar
from varl.distributed import Distributed
from varl.doctor import check_legibility
from varl.errors import checking, naming_memory
from varl.evaluation.held_out import comparison_table
from varl.loading import choose_device
from varl.models.inkling.checkpoint import save as save_inkling
from varl.models.inkling.pretrain import FINISHED, PretrainConfig, check_folder
from varl.models.inkling.pretrain import pretrain as pretrain_inkling
from varl.plan import estimate
from varl.policy_commands import (
    DoctorConfig,
    EvaluateConfig,
    GenerateConfig,
    ProbeConfig,
    doctor,
    evaluate,
    generate,
    probe,
)
from varl.run.files import check_writable, writing
from varl.run.folder import plain
from varl.run_config import need
from varl.trainer import Trainer

__all__ = [
    "DoctorConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "PlanConfig",
    "PretrainConfig",
    "ProbeConfig",
    "TrainConfig",
    "doctor",
    "evaluate",
    "from_recipe",
    "generate",
    "plan",
    "pretrain",
    "probe",
    "train",
]

logger = logging.getLogger(__name__)


def from_recipe(recipe: TrainConfig, config: type) -> dict[str, Any]:
    """What a recipe says of another command's settings, as plain values.

    Evaluating and generating take the held-out prompts, if there are some; probing and the doctor those of training.
    """
    held_out = config in (EvaluateConfig, GenerateConfig) and recipe.evaluation.enabled
    prompts = asdict(recipe.evaluation) if held_out else {"source": recipe.prompts.source}
    if config is GenerateConfig:
        prompts = {"source": prompts["source"]}
    sampling = (held_out and recipe.evaluation.sampling) or recipe.sampling
    shared = {"policy": asdict(recipe.policy), "sampling": asdict(sampling), "reward": recipe.reward}
    run = {"device": recipe.run.device, "batch": recipe.run.picture_batch}
    names = {field.name for field in fields(config)}
    return plain({name: value for name, value in (prompts | shared | run).items() if name in names})


def train(config: TrainConfig) -> None:
    """Tune a policy with reinforcement learning, as a recipe says.

    The run folder holds the configuration, metrics (JSON lines and TensorBoard), pictures with their masks,
    evaluations, checkpoints and, at the end, the tuned weights. The same command goes on with a run that was stopped.

    Started by torchrun, its processes share the work: torchrun --nproc-per-node 8 -m varl train RECIPE.
    """
    with checking():
        distributed = Distributed.here(config.parallel, choose_device(config.run.device))
    with distributed.guarded():
        _train(config, distributed)


def _train(config: TrainConfig, distributed: Distributed) -> None:
    console.quiet = not distributed.main
    with checking():
        trainer = Trainer(config, distributed)
    if distributed.main:
        for check in check_legibility(trainer.reward, [*trainer.stream.prompts, *trainer.held_out], 40, 2.0):
            if not check.fine:
                logger.warning("on a clean picture the OCR reward %s; such words cannot be learned", check.found)
    total = config.run.updates
    about = f": {trainer.schedule.describe()}; run folder {config.run.out}"
    console.print(Text.assemble((config.policy.family, "bold"), about), soft_wrap=True)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=total, completed=trainer.update, note="")

        def show(record: dict[str, Any]) -> None:
            parts = record["reward"]
            shown = {k: v for k, v in parts.items() if k in ("score", "word_accuracy") and v is not None}
            note = "  ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in shown.items())
            if record["dropped_groups"]:
                note += f"  dropped {record['dropped_groups']:.0%} of groups"
            bar.update(task, completed=record["update"], description=f"{record['kind']:>6}", note=note)

        trainer.run(show)
    if not distributed.main:
        return
    if (pair := trainer.folder.before_after()) is not None:
        console.print(comparison_table(*pair))
        if (picture := trainer.folder.path / "before_after.png").exists():  # of an earlier pair, if there is none now
            console.print(f"before and after: {picture}")
    console.print(f"tuned weights: {trainer.folder.path / 'weights.safetensors'}", soft_wrap=True)
    if trainer.lora:
        console.print(f"their adapters: {trainer.folder.path / 'adapters.safetensors'}", soft_wrap=True)


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Settings of ``varl plan``: those of ``varl train``, and the GPU.

    Attributes:
        gpu_memory: of one GPU, in GB (10^9 bytes).
    """

    gpu_memory: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        need(0 < self.gpu_memory < math.inf, f"gpu_memory must be positive and finite, got {self.gpu_memory}")


REMEDIES = {
    "rollout": "draw fewer pictures at once (--run.rollout_batch)",
    "decode": "decode fewer pictures at once (--run.micro_batch)",
    "update": "train on fewer sequences at once (--run.micro_batch), with --policy.checkpointing true",
    "optimizer": "train adapters (--policy.lora.rank 32)",
}


def plan(config: PlanConfig) -> None:
    """Estimate the memory that a recipe needs, and how many GPUs hold it, before anything is downloaded or run.

    The sizes come from the recipe alone (policy.config), so the files of policy.weights need not be there, and no GPU
    is used. A run goes through phases, one after the other: it draws pictures (rollout), decodes them, learns from
    them (update) and steps the optimizer. The peak is what is always there plus the largest phase. Several GPUs share
    the items marked so, as under full sharding; the others every GPU holds itself. A tenth of each GPU stays free.

    Too large? run.rollout_batch bounds the keys and values, run.micro_batch and policy.checkpointing the activations,
    policy.lora drops the optimizer's moments and the reference.
    """
    with checking():
        found = estimate(config)
    table = Table("what", "when", "GB", "shared", title=f"memory of one GPU, {config.policy.family}")
    for item in found.items:
        shared = "yes" if item.sharded else "if others are" if item.gathered else ""
        table.add_row(item.name, item.phase, f"{item.bytes / 1e9:.2f}", shared)
    table.add_section()
    phase = found.largest_phase()
    table.add_row("peak", phase, f"{found.peak() / 1e9:.2f}", "")
    console.print(table)
    console.print(f"trained: {found.trainable / 1e6:,.1f} million parameters")
    gpus = found.gpus(config.gpu_memory)
    if gpus is None:
        worst = found.largest_phase(10**9)
        console.print(f"no number of {config.gpu_memory:g} GB GPUs is enough: {REMEDIES[worst]}", soft_wrap=True)
        return
    each = "" if gpus == 1 else f" each, {found.peak(gpus) / 1e9:.2f} GB a GPU"
    console.print(f"GPUs of {config.gpu_memory:g} GB{each}: {gpus}", soft_wrap=True)


def pretrain(config: PretrainConfig) -> None:
    """Train the embedded model from nothing, in two stages: its tokenizer, then its transformer.

    The same command goes on with a run that was stopped. The finished weights are written to the run folder as fp16.
    """
    with checking():
        config = replace(config, device=str(choose_device(config.device)))
        check_folder(config)
        check_writable(config.out / FINISHED)
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps, note="")
            bar.update(tasks[stage], completed=step, note=f"loss {loss:.4f}")

        with naming_memory("draw fewer pictures a step: lower --tokenizer.batch and --transformer.batch"):
            policy = pretrain_inkling(config, show)
    path = config.out / FINISHED
    with writing(path):
        save_inkling(policy, path, torch.float16)
    console.print(f"weights: {path}")
