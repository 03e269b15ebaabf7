"""What surrounds the updates of a run, as settings: held-out evaluation, files and batches, and its processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from varl.effects import refuse_idle
from varl.sampling import Sampling

__all__ = ["EvaluationConfig", "ParallelConfig", "RunConfig", "expand", "need", "need_counts", "need_seeds"]

LARGEST_SEED, LARGEST_COUNT, LARGEST_SPAN = 2**63 - 1, 10**6, 10**9
"""Of seeds; of prompts, pictures and sequences; and of numbers of updates, which may be large to mean never."""
LONGEST_S = 1e7
"""Of a wait for other processes."""
MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))
"""Threads that may be asked for: a process cannot start any number, and dies of it."""


def need(fine: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: with the message, unless all is fine.
    """
    if not fine:
        raise ValueError(message)


def need_seeds(config: Any, *names: str, section: str = "") -> None:
    """Refuse seeds that generators do not take: they go from 0 to 2^63 - 1.

    Args:
        names: of fields of ``config``.
        section: stands before the names in messages: ``run.``.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        need(0 <= value <= LARGEST_SEED, f"{section}{name} must be from 0 to {LARGEST_SEED}, got {value}")


def need_counts(config: Any, *names: str, section: str = "", least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Refuse counts below the least, or beyond what any run has; the other arguments are those of ``need_seeds``.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        need(least <= value <= most, f"{section}{name} must be from {least} to {most}, got {value}")


def expand(config: Any, *names: str, section: str = "") -> None:
    """Set fields of a frozen configuration that are paths, or mappings of them, to those that ``~`` stands for.

    Raises:
        ValueError: naming the field, if it is empty, has a character that no path has, or names the home of nobody.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, dict):
            value = {key: _expanded(f"{section}{name}.{key}", path) for key, path in value.items()}
        object.__setattr__(config, name, value if isinstance(value, dict) else _expanded(f"{section}{name}", value))


def _expanded(name: str, path: Any) -> Any:
    """A path without ``~``; what is no path (None, a state dict) as it is."""
    if not isinstance(path, str | Path):
        return path
    try:
        usable = "\0" not in str(path) and bool(os.fsencode(path))
    except UnicodeEncodeError:
        usable = False
    need(usable, f"{name} must be a path, got {str(path)!r:.200}")
    found = os.path.expanduser(path)
    user = found.split("/")[0].removeprefix("~")
    need(not found.startswith("~"), f"{name} is {path}, but there is no user {user}; a folder of that name is ./{path}")
    return type(path)(found)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation.

    Attributes:
        source: a prompt file, or ``inkling:held-out``, generated from words that are never trained on.
        count: how many prompts to generate; ignored for files.
        prompt_seed: of the generated prompts.
        seed: of the pictures.
        sampling: how the pictures are drawn; by default as in training.
        every: updates between evaluations; 0 evaluates only before and after.
        enabled: evaluate at all.
        alarm_window: warn of reward hacking if over so many evaluations the training reward rose while a held-out
            metric fell, both beyond noise; 0 is never.
        alarm_stops: then also stop the run.
    """

    source: str = "inkling:held-out"
    count: int = 128
    prompt_seed: int = 1
    seed: int = 0
    sampling: Sampling | None = None
    every: int = 0
    enabled: bool = True
    alarm_window: int = 3
    alarm_stops: bool = False

    def __post_init__(self) -> None:
        need_counts(self, "count", section="evaluation.")
        need_seeds(self, "seed", "prompt_seed", section="evaluation.")
        window = self.alarm_window
        need(window == 0 or window > 1, f"evaluation.alarm_window must be 0, or at least 2, got {window}")
        need_counts(self, "every", section="evaluation.", least=0, most=LARGEST_SPAN)
        # What would be evaluated may stay where evaluation is switched off; when, and what follows from it, may not.
        others = ("every", "alarm_window", "alarm_stops")
        refuse_idle(
            "evaluation",
            self,
            [
                (not self.enabled, "with evaluation.enabled false", others),
                (window == 0, "with evaluation.alarm_window 0", ("alarm_stops",)),
            ],
        )


PICTURES = 32
"""Pictures at once where the run measures how many sequences are learned from at once."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that ``torchrun`` starts share the work; with one process it matters little.

    Attributes:
        mode: ``ddp``: every process holds the model; ``fsdp2``: they share its parameters, gradients and moments.
        param_dtype: type that fsdp2 gathers the weights of blocks in; ``bfloat16``, for policy.precision bfloat16 only,
            halves what is sent. Gradients are summed in float32.
        cpu_offload: fsdp2 keeps parameters, gradients and moments in the CPU's memory.
        timeout: seconds that a process waits for the others before it gives up.
    """

    mode: Literal["ddp", "fsdp2"] = "ddp"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    cpu_offload: bool = False
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        fine = 0 < self.timeout <= LONGEST_S
        need(fine, f"parallel.timeout must be positive, and at most {LONGEST_S:g} seconds, got {self.timeout}")
        for name, off in (("param_dtype", "float32"), ("cpu_offload", False)):
            value = getattr(self, name)
            need(self.mode == "fsdp2" or value == off, f"parallel.{name} {value} needs parallel.mode fsdp2")


@dataclass(frozen=True)
class RunConfig:
    """How long, where and how.

    Attributes:
        out: run folder; a run found there is gone on with.
        updates: optimizer updates in all.
        seed: of everything drawn in training.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of the model; 0 leaves torch's choice.
        deterministic: compute on a GPU to the same bits each time, on the same card with the same versions: slower, and
            attention takes more memory. It holds for the whole process.
        micro_batch: sequences in one forward and backward pass, and pictures decoded or evaluated at once; ``auto``
            measures, at the first update of each kind, what costs the least time and fits in memory, and keeps to it in
            this run folder.
        rollout_batch: pictures drawn at once, which bounds the caches of keys and values; 0 draws all of an update's.
        overlap: score pictures while others are drawn and the reference is run, in parts of ``rollout_batch`` (if 0, in
            quarters of an update). The same numbers, if a picture's reward does not depend on its batch.
        ema: evaluate and export an exponential moving average of the weights, of which an update keeps this share; 0 is
            the weights themselves.
        save_every: updates between checkpoints.
        keep: newest checkpoints kept; that of the best held-out score stays besides.
        failure_window: of how many last updates the failures are counted.
        max_failed_share: stop if in these more than this share of the pictures or optimizer steps failed; 1 is never.
        gallery_every: in every so many updates, the last one of each kind leaves pictures of its samples and masks; 0
            is never.
        diagnose_every: in every so many updates, the gradient's norm by step is measured at the last one of each kind,
            over all its sequences, which costs about as much again as each trained step; 0 is never.
    """

    out: Path = Path("runs/train")
    updates: int = 100
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    deterministic: bool = False
    micro_batch: int | Literal["auto"] = 32
    rollout_batch: int = 0
    overlap: bool = False
    ema: float = 0.0
    save_every: int = 20
    keep: int = 2
    failure_window: int = 20
    max_failed_share: float = 0.5
    gallery_every: int = 20
    diagnose_every: int = 20

    def __post_init__(self) -> None:
        expand(self, "out", section="run.")
        need_seeds(self, "seed", section="run.")
        need(0 <= self.ema < 1, f"run.ema must be 0 or more, and less than 1, got {self.ema}")
        need_counts(self, "updates", "save_every", "keep", "failure_window", section="run.", most=LARGEST_SPAN)
        if self.micro_batch != "auto":
            need_counts(self, "micro_batch", section="run.")
        share = self.max_failed_share
        need(0 <= share <= 1, f"run.max_failed_share must be in [0, 1], got {share}")
        refuse_idle("run", self, [(share in (0, 1), f"with run.max_failed_share {share:g}", ("failure_window",))])
        need_counts(self, "threads", section="run.", least=0, most=MOST_THREADS)
        need_counts(self, "rollout_batch", section="run.", least=0)
        need_counts(self, "gallery_every", "diagnose_every", section="run.", least=0, most=LARGEST_SPAN)

    @property
    def picture_batch(self) -> int:
        """Pictures that an evaluation draws and decodes at once: no more than training does."""
        sequences = PICTURES if self.micro_batch == "auto" else self.micro_batch
        return min(sequences, self.rollout_batch or sequences)
