"""What each command does; ``varl.cli`` parses for them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from varl.config import PolicyConfig, TrainConfig
from varl.distributed import Distributed
from varl.doctor import check_enough, check_policy, check_reader
from varl.errors import checking
from varl.evaluation.held_out import comparison_table
from varl.evaluation.held_out import evaluate as evaluate_policy
from varl.loading import autocast, choose_device, prepare
from varl.models.inkling.checkpoint import save as save_inkling
from varl.models.inkling.pretrain import PretrainConfig
from varl.models.inkling.pretrain import pretrain as pretrain_inkling
from varl.plan import estimate
from varl.policy import Policy, Prompt
from varl.probe import check_counts
from varl.probe import probe as probe_policy
from varl.prompts import check_prompts, quoted_words, resolve_prompts
from varl.rewards import load_reward
from varl.rollout import rollout, row_generators
from varl.run.folder import plain
from varl.run.gallery import save_pictures
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule
from varl.trainer import Trainer

__all__ = ["doctor", "evaluate", "from_recipe", "generate", "plan", "pretrain", "probe", "train"]

console = Console()
SHIPPED_SAMPLING = Sampling()


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


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


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
    total = config.run.updates
    about = f"[bold]{config.policy.family}[/]: {trainer.schedule.describe()}; run folder {config.run.out}"
    console.print(about, soft_wrap=True)
    with _progress() as bar:
        task = bar.add_task("evaluating", total=total, completed=trainer.update, note="")

        def show(record: dict[str, Any]) -> None:
            parts = record["reward"]
            shown = {k: v for k, v in parts.items() if k in ("score", "word_accuracy") and v is not None}
            note = "  ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in shown.items())
            if record["dropped_groups"]:
                note += f"  [red]dropped {record['dropped_groups']:.0%} of groups[/]"
            bar.update(task, completed=record["update"], description=f"{record['kind']:>6}", note=note)

        trainer.run(show)
    if not distributed.main:
        return
    evaluated = trainer.folder.evaluated()
    if len(evaluated) > 1:
        first, last = (trainer.folder.result(update, trainer.held_out) for update in (evaluated[0], evaluated[-1]))
        console.print(comparison_table(first, last))
    picture = trainer.folder.path / "before_after.png"
    if picture.exists():
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
        if not self.gpu_memory > 0:
            raise ValueError(f"gpu_memory must be positive, got {self.gpu_memory}")


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


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of ``varl generate``.

    Attributes:
        prompt: a prompt as written, e.g. "the words 'KEBA' at the top, 'LUX' at the bottom", or a list of them; instead
            of a source.
        source: a prompt file; ``inkling:held-out``; or ``labels:0-999``, classes.
        count: how many prompts of the source to generate or take.
        batch: pictures drawn at once.
        out: the picture to write: one sheet of all samples.
        policy: the model.
        sampling: how it is sampled.
        seed: of the draws.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    prompt: list[str] | str = field(default_factory=list)
    source: str = "inkling:held-out"
    count: int = 16
    batch: int = 32
    out: Path = Path("pictures.png")
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: Sampling = SHIPPED_SAMPLING
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_batch(self.batch)


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch must be at least 1 picture, got {batch}")


def _load(config: PolicyConfig, device: str) -> tuple[Policy, ScaleSchedule, torch.autocast]:
    """A policy for use, not training: its schedule, and the precision it computes in."""
    chosen = choose_device(device)
    policy = prepare(config, chosen)
    return policy, policy.schedules(config.resolution, config.aspect_ratio), autocast(config, chosen)


def generate(config: GenerateConfig) -> None:
    """Draw pictures for prompts and save them as one sheet."""
    with checking():
        texts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
        prompts = [Prompt(text, quoted_words(text)) for text in texts]
        prompts = prompts or resolve_prompts(config.source, count=config.count)[: config.count]
        policy, schedule, precision = _load(config.policy, config.device)
        check_prompts(policy, prompts, schedule)
        if not config.out.resolve().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {config.out.resolve().parent} to write {config.out.name} into")
    generators, pictures = row_generators((config.seed,), len(prompts)), []
    with precision:
        for first in range(0, len(prompts), config.batch):
            rows = slice(first, first + config.batch)
            drawn = rollout(policy, policy.condition(prompts[rows], schedule), config.sampling, generators[rows])
            pictures.append(policy.decode(drawn.actions, schedule).float().cpu())
    save_pictures(config.out, prompts, torch.cat(pictures))
    console.print(f"{len(prompts)} pictures: {config.out}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of ``varl evaluate``.

    Attributes:
        source: a prompt file; ``inkling:held-out``, generated from words that are never trained on; or
            ``labels:0-999``, classes.
        count: how many prompts to generate; ignored for files.
        prompt_seed: of the generated prompts.
        seed: of the pictures.
        batch: pictures drawn at once.
        policy: the model.
        sampling: how it is sampled.
        reward: ``ocr``, ``my_module:my_reward``, or a mapping with options.
        out: also write the result as JSON.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    source: str = "inkling:held-out"
    count: int = 128
    prompt_seed: int = 1
    seed: int = 0
    batch: int = 32
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: Sampling = SHIPPED_SAMPLING
    reward: str | dict[str, Any] = "ocr"
    out: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_batch(self.batch)


def evaluate(config: EvaluateConfig) -> None:
    """Score a policy on held-out prompts: word accuracy, NED and reward, each with a 95% interval."""
    with checking():
        prompts = resolve_prompts(config.source, count=config.count, seed=config.prompt_seed)
        reward, (policy, schedule, precision) = load_reward(config.reward), _load(config.policy, config.device)
        check_prompts(policy, prompts, schedule)
    with _progress() as bar:
        task = bar.add_task("evaluating", total=len(prompts), note="")
        result = evaluate_policy(
            policy,
            prompts,
            config.sampling,
            reward,
            seed=config.seed,
            batch=config.batch,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            schedule=schedule,
            precision=precision,
        )
    console.print(result.table())
    if config.out is not None:
        config.out.write_text(json.dumps(result.to_dict(), indent=1))


def pretrain(config: PretrainConfig) -> None:
    """Train the embedded model from nothing, in two stages: its tokenizer, then its transformer.

    The same command goes on with a run that was stopped. The finished weights are written to the run folder as fp16.
    """
    with _progress() as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps, note="")
            bar.update(tasks[stage], completed=step, note=f"loss {loss:.4f}")

        with checking():
            choose_device(config.device)
        policy = pretrain_inkling(config, show)
    path = config.out / "inkling.safetensors"
    save_inkling(policy, path, torch.float16)
    console.print(f"weights: {path}")


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of ``varl probe``.

    Attributes:
        source: prompt file, or ``inkling:train``.
        count: prompts to measure on.
        prefixes: states drawn for every prompt and step.
        continuations: continuations of each.
        batch: pictures drawn at once, but at least those of one prompt.
        policy: the model.
        sampling: how it is sampled.
        reward: ``ocr``, ``my_module:my_reward``, or a mapping with options.
        out: folder for probe.json and probe.png.
        seed: of the draws.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    source: str = "inkling:train"
    count: int = 24
    prefixes: int = 4
    continuations: int = 4
    batch: int = 512
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: Sampling = SHIPPED_SAMPLING
    reward: str | dict[str, Any] = "ocr"
    out: Path = Path("runs/probe")
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _check_batch(self.batch)


def probe(config: ProbeConfig) -> None:
    """Measure at which step the reward is decided, and suggest m and the alternation.

    For each step: the share of the within-prompt variance of the reward that lies between states at that step, by
    nested draws that fork the caches, and the entropy of its tokens.
    """
    with checking():
        prompts = resolve_prompts(config.source, count=config.count)[: config.count]
        check_counts(len(prompts), config.prefixes, config.continuations)
        reward, (policy, schedule, precision) = load_reward(config.reward), _load(config.policy, config.device)
        check_prompts(policy, prompts, schedule)
        config.out.mkdir(parents=True, exist_ok=True)
    with _progress() as bar, precision:
        task = bar.add_task("probing", total=None, note="")
        result = probe_policy(
            policy,
            reward,
            prompts,
            config.sampling,
            prefixes=config.prefixes,
            continuations=config.continuations,
            batch=config.batch,
            seed=config.seed,
            schedule=schedule,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(result.table())
    m, n = result.suggestion()
    suggestion = f"suggestion: --method.middle {m} --method.prefix_updates {n} --method.suffix_updates 1"
    console.print(suggestion, soft_wrap=True)
    (config.out / "probe.json").write_text(json.dumps(result.to_dict(), indent=1))
    result.plot(config.out / "probe.png")
    console.print(f"figure: {config.out / 'probe.png'}")


@dataclass(frozen=True)
class DoctorConfig:
    """Settings of ``varl doctor``.

    Attributes:
        source: prompt file, or ``inkling:train``.
        policy: the model.
        reward: ``ocr``, ``my_module:my_reward``, or a mapping with options.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    source: str = "inkling:train"
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: str | dict[str, Any] = "ocr"
    device: str = "auto"


def doctor(config: DoctorConfig) -> int:
    """Check what training relies on: exact on-policy ratios, caches, batches, seeds and the reward."""
    with checking():
        prompts = resolve_prompts(config.source, count=4)[:4]
        check_enough(prompts)
        reward, (policy, schedule, _) = load_reward(config.reward), _load(config.policy, config.device)
        check_prompts(policy, prompts, schedule)
    failed = 0
    for check in [*check_policy(policy, prompts, schedule=schedule), check_reader(reward)]:
        mark = "[green]ok[/]  " if check.fine else "[red]FAIL[/]"
        console.print(f"{mark} {check.name}: {check.found}")
        failed += not check.fine
    return 1 if failed else 0
