"""Compiled blocks against blocks as they are: what is drawn and learned in an update, each alone.

Making the graphs takes most of the time: those of drawing a first token, of drawing grids, of forward and backward.
On a CPU a short run makes only those of forward.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Row, Settings, generators, in_turn, timed
from benchmarks.shapes import Bench, Precision, extent, paper
from varl.rollout import rollout
from varl.scoring import log_probs

__all__ = ["TITLE", "check", "compiler", "rows"]

TITLE = "compiled blocks: the same without compiling over it (baseline / ours)"
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the mean log-probabilities of both ways may be apart, relative."""


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Each part, in fp32 on a CPU and in bf16 on a GPU.

    Raises:
        AssertionError: if the two ways give different log-probabilities.
    """
    precision: Precision = "float32" if settings.device == "cpu" else "bfloat16"
    one = extent(settings)
    config = one.config(paper())
    config = replace(config, policy=replace(config.policy, precision=precision))
    ways = [replace(config, policy=replace(config.policy, compile=on)) for on in (True, False)]
    own, plain = (_Parts(Bench(way, settings, folder, decoder=False)) for way in ways)
    few = settings.short and settings.device == "cpu"
    found = []
    for what in ["forward alone"] if few else ["drawing", "forward and backward"]:
        first = timed(lambda: own.take(what), settings.device)  # noqa: B023  # called here and now
        check(own.take(what), plain.take(what), AGREE[precision])
        seconds = in_turn({"own": lambda: own.take(what), "plain": lambda: plain.take(what)}, settings)  # noqa: B023
        text = f"without / with; the first call took {first:.1f} s"
        group = f"{one.name}, {one.group} rows, {precision}"
        found.append(Row.speedup(group, what, seconds["own"], seconds["plain"], text))
    return found


class _Parts:
    """What of an update the blocks compute, on sequences that are always the same."""

    def __init__(self, bench: Bench) -> None:
        self.trainer, schedule = bench.trainer, bench.trainer.schedule
        self.condition = self.trainer.policy.condition(bench.prompts(), schedule).repeat(bench.plan("prefix").group)
        tokens = (self.condition.batch, schedule.tokens)
        made = torch.randint(self.trainer.policy.classes, tokens, generator=torch.Generator().manual_seed(0))
        self.actions = made.to(self.condition.device)

    def take(self, what: str) -> Tensor | None:
        """One part: ``drawing``, ``forward alone`` or ``forward and backward``; the log-probabilities, if it has some.

        Sequences are drawn guided and truncated; log-probabilities are of all their tokens.
        """
        policy, drawing = self.trainer.policy, what == "drawing"
        with self.trainer.precision(drawing):
            if drawing:
                own = generators(policy, (0,), self.condition.batch)
                rollout(policy, self.condition, self.trainer.config.sampling, own)
                return None
            with torch.set_grad_enabled(what == "forward and backward"):
                logp = log_probs(policy, self.condition, self.actions).logp
                if logp.requires_grad:
                    logp.sum().backward()
        policy.trainable.zero_grad(set_to_none=True)
        return logp.detach()


def check(own: Tensor | None, plain: Tensor | None, agree: float) -> None:
    """That both ways give the same log-probabilities, if there are some.

    Raises:
        AssertionError: if they do not.
    """
    if own is None or plain is None:
        return
    ours, theirs = (float(logp.double().mean()) for logp in (own, plain))
    if not abs(ours - theirs) <= agree * abs(theirs):
        raise AssertionError(f"the mean log-probability of compiled blocks is {ours}, and {theirs} without compiling")


def compiler(device: str) -> str | None:
    """The compiler that ``torch.compile`` calls for a device, if it is there: C++ for a CPU, C for a GPU."""
    named = os.environ.get("CXX" if device == "cpu" else "CC")
    names = [named] if named else ["g++", "clang++"] if device == "cpu" else ["gcc", "clang", "cc"]
    return next((found for name in names if (found := shutil.which(name))), None)
