"""Peak memory of an update, against the naive way and against the logits of all its tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from benchmarks.live import LiveStorage
from benchmarks.measure import Goal, Row, Settings, Spread
from benchmarks.shapes import SIDES, Bench, Kind, Naive, Step
from benchmarks.updates import cases

__all__ = ["TITLE", "peak", "rows"]

TITLE = "peak memory of an update, beside weights and optimizer (ours / baseline)"


def rows(settings: Settings, folder: Path) -> list[Row]:
    """The updates of the section ``updates`` at 1024 pixels, on a full run also at 256; counted, so once is enough.

    Pictures are drawn as many at a time as are trained.
    """
    found = []
    every = cases(settings)
    for case in [every[name] for name in (("var", "fine") if settings.full else ("fine",)) if name in every]:
        batch = cast(int, case.config.run.micro_batch)  # never "auto" here
        run = replace(case.config.run, rollout_batch=batch)
        bench = Bench(replace(case.config, run=run), settings, folder, case.decoder)
        for optimizer in (*bench.trainer.learner.optimizers.values(), bench.naive_optimizer):
            _make_moments(optimizer)
        kinds: tuple[Kind, ...] = ("prefix", "suffix")
        if settings.device != "cpu":
            bench.step("prefix")  # the libraries take their workspaces at the first call, and keep them
        for kind in kinds:
            found += _kind_rows(bench, kind, f"{case.name}: {kind} update", settings.device)
    return found


def _kind_rows(bench: Bench, kind: Kind, group: str, device: str) -> list[Row]:
    trainer, steps, plain = bench.trainer, list[Step](), list[Naive]()
    whole = peak(lambda: steps.append(bench.step(kind)), device)
    batch = steps[0].batch
    naive_whole = peak(lambda: plain.append(bench.naive(kind, batch)), device)
    learning = peak(lambda: bench.learn(batch), device)
    naive_learning = peak(lambda: bench.naive_learn(kind, batch, plain[0].finished), device)
    rows = min(trainer.learner.micro_batch, len(batch.sequences))
    logits = 4 * rows * trainer.schedule.tokens * trainer.policy.classes
    goal = Goal(0.5, at_least=False) if trainer.schedule.grids[-1][0] == SIDES[-1] else None
    text = f"ours / fp32 logits of all tokens, {rows} rows"
    return [
        _row(group, "whole, against the naive way", whole, naive_whole, "ours / naive", goal),
        _row(group, "update stage, against the naive way", learning, naive_learning, "ours / naive"),
        _row(group, "whole, against tokens x vocabulary", whole, logits, text),
        _row(group, "update stage, against tokens x vocabulary", learning, logits, text),
    ]


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer allocate what it would in its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _row(group: str, what: str, ours: float, other: float, against: str, goal: Goal | None = None) -> Row:
    mine, theirs = Spread.exact(ours / 1e6), Spread.exact(other / 1e6)
    return Row(group, what, "MB", mine, theirs, Spread.exact(ours / other), against, goal)


def peak(work: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes alive at once beside what was there before: torch's own count on a GPU, ours on a CPU.

    On a CPU that is what operators return, in the calling thread; their scratch space inside a call does not count.
    """
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with LiveStorage() as storage:
        work()
    return storage.peak
