"""How everything here is measured and shown: arms in turn, medians with their spread, ratios against a baseline."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import varl
from varl.policy import Policy
from varl.rollout import row_generators

__all__ = [
    "Goal",
    "Row",
    "Settings",
    "Spread",
    "generators",
    "in_turn",
    "machine",
    "now",
    "product",
    "section_table",
    "timed",
]

SIDE = 4096


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        full: larger shapes and more rounds, for a quiet machine.
        short: one shape of a model, for a minute on a GPU, or for a minute on two cores to rehearse that.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of torch.
        seed: of weights, prompts and draws.
        rounds: times every arm runs.
        figures: folder that pictures are written to, if any.
    """

    full: bool = False
    device: str = "cpu"
    threads: int = 2
    seed: int = 0
    rounds: int = 2
    figures: Path | None = None
    short: bool = False


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it, of ``rounds`` values."""

    median: float
    low: float
    high: float
    rounds: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, high = np.quantile(values, (0.25, 0.75))
        return cls(statistics.median(values), float(low), float(high), len(values))

    @classmethod
    def exact(cls, value: float) -> Spread:
        """A number that is counted, not measured."""
        return cls(value, value, value)

    def over(self, divisor: float) -> Spread:
        return Spread(self.median / divisor, self.low / divisor, self.high / divisor, self.rounds)


@dataclass(frozen=True)
class Goal:
    """What a ratio should reach: at least ``value``, or at most."""

    value: float
    at_least: bool = True

    def met(self, ratio: float) -> bool:
        return ratio >= self.value if self.at_least else ratio <= self.value


@dataclass(frozen=True)
class Row:
    """One line of a table: a measurement, its baseline of the same run, and the ratio of the two.

    Attributes:
        group: what was run.
        what: the part of it, or the way it was run.
        ours, baseline: in ``unit``.
        ratio: of pairs from the same round, where there are pairs.
        against: what the baseline is, and which way the ratio goes.
        goal: of the ratio's median.
    """

    group: str
    what: str
    unit: str
    ours: Spread
    baseline: Spread
    ratio: Spread
    against: str
    goal: Goal | None = None

    @classmethod
    def speedup(
        cls,
        group: str,
        what: str,
        ours: Sequence[float],
        naive: Sequence[float],
        against: str,
        goal: Goal | None = None,
    ) -> Row:
        """How many times faster: baseline over ours, round by round."""
        ratio = Spread.of([n / o if o > 0 else float("nan") for o, n in zip(ours, naive, strict=True)])
        return cls(group, what, "s", Spread.of(ours), Spread.of(naive), ratio, against, goal)

    @classmethod
    def share(
        cls, group: str, what: str, unit: str, part: Sequence[float], whole: Sequence[float], against: str,
        goal: Goal | None = None,
    ) -> Row:  # fmt: skip
        """Which part of the baseline: ours over baseline, round by round."""
        ratio = Spread.of([p / w for p, w in zip(part, whole, strict=True)])
        return cls(group, what, unit, Spread.of(part), Spread.of(whole), ratio, against, goal)

    def record(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        met = None if self.goal is None else self.goal.met(self.ratio.median)
        return {**asdict(self), "met": met}


def now(device: str = "cpu") -> float:
    """Seconds of a clock, when the device has come to the end of all that it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call."""
    start = now(device)
    work()
    return now(device) - start


def in_turn(arms: Mapping[str, Callable[[], object]], settings: Settings, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every arm, ``settings.rounds`` times; one after another, so that a slow minute slows all of them.

    Args:
        warm: rounds before, that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm + settings.rounds):
        gc.collect()
        for name, work in arms.items():
            took = timed(work, settings.device)
            if turn >= warm:
                seconds[name].append(took)
    return seconds


def product(settings: Settings, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], object], float]:
    """A large matrix product to measure a machine by, and its floating-point operations; on a GPU larger, and several.

    A GPU is done with one in less than the time that it takes to begin and to wait.
    """
    side, times = (SIDE, 1) if settings.device == "cpu" else (2 * SIDE, 8)
    left, right = (torch.randn(side, side, device=settings.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return multiply, 2.0 * side**3 * times


def generators(policy: Policy, seed: Sequence[int], rows: int) -> list[torch.Generator]:
    """A generator a row where a run has them: on the policy's device."""
    return row_generators(seed, rows, next(policy.trainable.parameters()).device)


def machine(settings: Settings) -> dict[str, Any]:
    """What the numbers were taken on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if settings.device != "cpu" else None
    return {
        "cpu": name,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "varl": varl.__version__,
    }


def section_table(title: str, rows: Sequence[Row]) -> Table:
    """A section as a table."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "ours", "baseline", "ratio", "quartiles", "goal", "against"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    last = None
    for row in rows:
        if row.group != last:
            table.add_row(row.group, style="bold")
            last = row.group
        goal = ""
        if row.goal is not None:
            met = "met" if row.goal.met(row.ratio.median) else "[red]MISSED[/red]"
            goal = f"{'>=' if row.goal.at_least else '<='} {row.goal.value:g} {met}"
        between = f"{row.ratio.low:.2f}-{row.ratio.high:.2f}" if row.ratio.rounds > 1 else ""
        amounts = (f"{_short(s.median)} {row.unit}" for s in (row.ours, row.baseline))
        table.add_row(f"  {row.what}", *amounts, f"{row.ratio.median:.2f}", between, goal, row.against)
    return table


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
