"""What the commands do that use a policy and do not train it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from varl.config import PolicyConfig
from varl.console import console, progress_bar
from varl.doctor import check_enough, check_legibility, check_policy, check_reader
from varl.errors import checking, naming_memory
from varl.evaluation.held_out import evaluate as evaluate_policy
from varl.loading import autocast, choose_device, prepare
from varl.policy import Policy, Prompt
from varl.probe import check_counts
from varl.probe import probe as probe_policy
from varl.prompts import check_prompts, quoted_words, resolve_prompts
from varl.rewards import check_reward, load_reward
from varl.rollout import rollout, row_generators
from varl.run.files import check_writable, make_folder, writing
from varl.run.gallery import save_pictures
from varl.run_config import LARGEST_COUNT, expand, need, need_counts, need_seeds
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule

__all__ = ["DoctorConfig", "EvaluateConfig", "GenerateConfig", "ProbeConfig", "doctor", "evaluate", "generate", "probe"]

SHIPPED_SAMPLING = Sampling()
MOST_PICTURES = 10_000
"""On one sheet."""


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of ``varl generate``.

    Attributes:
        prompt: a prompt as written, e.g. "the words 'KEBA' at the top, 'LUX' at the bottom", or a list of them; instead
            of a source; by default the source's.
        source: a prompt file; ``inkling:held-out``; or ``labels:0-999``, classes.
        count: how many prompts of the source to generate or take; at most 10,000, for one sheet.
        batch: pictures drawn at once.
        out: the picture to write: one sheet of all samples.
        policy: the model.
        sampling: how it is sampled.
        seed: of the draws.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    prompt: list[str] | str | None = None
    source: str = "inkling:held-out"
    count: int = 16
    batch: int = 32
    out: Path = Path("pictures.png")
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: Sampling = SHIPPED_SAMPLING
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        expand(self, "out")
        need_counts(self, "count", most=MOST_PICTURES)
        need_counts(self, "batch")
        need_seeds(self, "seed")
        need(self.prompt != [], "prompt is an empty list; give a text or several, or leave it out for those of source")
        number = len(self.prompt) if isinstance(self.prompt, list) else 1
        need(number <= MOST_PICTURES, f"prompt must be {MOST_PICTURES} texts at most, for one sheet; got {number}")
        fine = self.out.suffix.lower() == ".png" or self.out.is_dir()  # of a folder, check_writable says what it is
        need(fine, f"out must end in .png, for it is a PNG picture; got {self.out}")


LOWER = "draw fewer pictures at once: lower --batch"


def _load(config: PolicyConfig, device: str) -> tuple[Policy, ScaleSchedule, torch.autocast]:
    """A policy for use, not training: its schedule, and the precision it computes in."""
    chosen = choose_device(device)
    policy = prepare(config, chosen)
    return policy, policy.schedules(config.resolution, config.aspect_ratio), autocast(config, chosen)


def generate(config: GenerateConfig) -> None:
    """Draw pictures for prompts and save them as one sheet."""
    with checking():
        texts = [config.prompt] if isinstance(config.prompt, str) else config.prompt or []
        prompts = [Prompt(text, quoted_words(text)) for text in texts]
        check_writable(config.out)
        prompts = prompts or resolve_prompts(config.source, count=config.count)[: config.count]
        policy, schedule, precision = _load(config.policy, config.device)
        check_prompts(policy, prompts, schedule)
    pictures = []
    with naming_memory(LOWER), precision:
        for first in range(0, len(prompts), config.batch):
            rows = range(first, min(first + config.batch, len(prompts)))
            condition = policy.condition(prompts[first : rows.stop], schedule)
            own = row_generators((config.seed,), rows, condition.device)
            drawn = rollout(policy, condition, config.sampling, own)
            pictures.append(policy.decode(drawn.actions, schedule).float().cpu())
    with writing(config.out, "the pictures are lost; draw them again"):
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
        expand(self, "out")
        need_counts(self, "count", "batch")
        need_seeds(self, "seed", "prompt_seed")


def evaluate(config: EvaluateConfig) -> None:
    """Score a policy on held-out prompts: word accuracy, NED and reward, each with a 95% interval."""
    with checking():
        if config.out is not None:
            check_writable(config.out)
        prompts = resolve_prompts(config.source, count=config.count, seed=config.prompt_seed)
        reward, (policy, schedule, precision) = load_reward(config.reward), _load(config.policy, config.device)
        check_reward(reward, prompts, config.source)
        check_prompts(policy, prompts, schedule)
    with naming_memory(LOWER), progress_bar() as bar:
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
        with writing(config.out, "the result is what is printed above"):
            config.out.write_text(json.dumps(result.to_dict(), indent=1))


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
        expand(self, "out")
        need_counts(self, "count", "prefixes", "continuations", "batch")
        pictures = self.prefixes * self.continuations
        need(pictures <= LARGEST_COUNT, f"prefixes x continuations must be at most {LARGEST_COUNT}, got {pictures}")
        need_seeds(self, "seed")


def probe(config: ProbeConfig) -> None:
    """Measure at which step the reward is decided, and suggest m and the alternation.

    For each step: the share of the within-prompt variance of the reward that lies between states at that step, by
    nested draws that fork the caches, and the entropy of its tokens.
    """
    table, figure = config.out / "probe.json", config.out / "probe.png"
    with checking():
        make_folder(config.out)
        check_writable(table)
        check_writable(figure)
        prompts = resolve_prompts(config.source, count=config.count)[: config.count]
        check_counts(len(prompts), config.prefixes, config.continuations)
        reward, (policy, schedule, precision) = load_reward(config.reward), _load(config.policy, config.device)
        check_reward(reward, prompts, config.source)
        check_prompts(policy, prompts, schedule)
    with naming_memory(LOWER), progress_bar() as bar, precision:
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
    with writing(table, "the result is what is printed above"):
        table.write_text(json.dumps(result.to_dict(), indent=1))
        result.plot(figure)
    console.print(f"figure: {figure}")


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
        every = resolve_prompts(config.source)
        prompts = every[:4]
        check_enough(prompts)
        reward, (policy, schedule, _) = load_reward(config.reward), _load(config.policy, config.device)
        check_reward(reward, every, config.source)
        check_prompts(policy, prompts, schedule)
    failed = 0
    checks = [*check_policy(policy, prompts, schedule=schedule), check_reader(reward), *check_legibility(reward, every)]
    for check in checks:
        mark = Text("ok  ", "green") if check.fine else Text("FAIL", "red")
        console.print(mark, f"{check.name}: {check.found}")
        failed += not check.fine
    return 1 if failed else 0
