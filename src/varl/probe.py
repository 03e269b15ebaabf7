"""The measured answer to "which m?": what share of the reward each step has decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from varl.policy import Condition, Policy, Prompt
from varl.rewards import Reward
from varl.rollout import rollout, row_generators
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule
from varl.scoring import log_probs

__all__ = ["Probe", "StepReport", "check_counts", "decided_share", "probe"]


@dataclass(frozen=True)
class StepReport:
    """What is known of one step.

    Attributes:
        step: number of steps drawn (m).
        side: side of the last grid drawn, sqrt(h w).
        tokens_left: share of all tokens that are still to be drawn.
        share: share of the within-prompt reward variance that the state decides, in [0, 1] but for noise.
        error: its standard error, by the jackknife over prompts.
        entropy: mean entropy of this step's tokens, in nats.
    """

    step: int
    side: float
    tokens_left: float
    share: float
    error: float
    entropy: float


@dataclass(frozen=True)
class Probe:
    """The result of ``probe``."""

    schedule: ScaleSchedule
    steps: list[StepReport]
    pictures: int
    failed: int

    def suggestion(self) -> tuple[int, int]:
        """(m, prefix updates for each suffix update).

        m is the first step that has decided three quarters of the reward's variance, else the one that has decided
        most; the alternation follows the shares that prefix and suffix decide, from 1 to 9.
        """
        inner = self.steps[:-1]
        enough = [s for s in inner if s.share >= 0.75]
        best = enough[0] if enough else max(inner, key=lambda s: s.share)
        ratio = best.share / max(1 - best.share, 1e-6)
        return best.step, max(1, min(9, round(ratio)))

    def table(self) -> Table:
        """A table of the steps."""
        table = Table(title=f"decided at each step ({self.pictures} pictures, {self.failed} failed)")
        for name in ("steps", "grid side", "tokens left", "reward decided", "entropy / token"):
            table.add_column(name, justify="right")
        for s in self.steps:
            share = f"{s.share:.2f} ± {s.error:.2f}"
            table.add_row(str(s.step), f"{s.side:g}", f"{s.tokens_left:.0%}", share, f"{s.entropy:.2f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        m, n = self.suggestion()
        return {
            "grids": self.schedule.grids,
            "pictures": self.pictures,
            "failed": self.failed,
            "steps": [asdict(s) for s in self.steps],
            "suggested_m": m,
            "suggested_alternation": [n, 1],
        }

    def plot(self, path: Path) -> None:
        """Save a figure: reward decided and tokens drawn against the step."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        x = [s.step for s in self.steps]
        shares, errors = [s.share for s in self.steps], [s.error for s in self.steps]
        axes.errorbar(x, shares, errors, marker="o", capsize=3, label="reward variance decided")
        axes.plot(x, [1 - s.tokens_left for s in self.steps], "s--", color="0.6", label="tokens drawn")
        axes.axvline(self.suggestion()[0], color="tab:green", alpha=0.5, label="suggested m")
        axes.set_xticks(x, [f"{s.side:g}" for s in self.steps])
        axes.set(xlabel="side of the last grid drawn", ylabel="share", ylim=(-0.05, 1.05))
        axes.legend()
        figure.savefig(path, dpi=150)


def check_counts(prompts: int, prefixes: int, continuations: int) -> None:
    """Refuse a probe whose variances could not be estimated.

    Raises:
        ValueError: if there are fewer than 2 prompts, prefixes or continuations.
    """
    for name, count in (("prompts", prompts), ("prefixes", prefixes), ("continuations", continuations)):
        if count < 2:
            raise ValueError(f"a probe needs at least 2 {name}, got {count}")


def decided_share(scores_PNK: Tensor) -> tuple[float, float]:
    """The share of the within-prompt variance of a reward that lies between prefixes, and its standard error.

    One-way random effects: with mean squares between and within the N prefixes of a prompt, pooled over prompts, the
    variance between is (MS_between - MS_within) / K, the one within MS_within.

    Args:
        scores_PNK: P prompts, N >= 2 prefixes of each, K >= 2 continuations of each prefix.

    Raises:
        ValueError: if there are fewer than 2 prompts, prefixes or continuations.
    """
    prompts, prefixes, k = scores_PNK.shape
    check_counts(prompts, prefixes, k)
    scores = scores_PNK.double()
    means = scores.mean(2)
    within_P = (scores - means[:, :, None]).square().sum((1, 2)) / (prefixes * (k - 1))
    between_P = (k * (means - means.mean(1, keepdim=True)).square().sum(1) / (prefixes - 1) - within_P) / k

    def share(between: Tensor, within: Tensor) -> Tensor:
        return between / (between + within).clamp(min=1e-12)

    total_between, total_within = between_P.sum(), within_P.sum()
    left_out = share(total_between - between_P, total_within - within_P)
    error = ((prompts - 1) / prompts * (left_out - left_out.mean()).square().sum()).sqrt()
    return float(share(total_between, total_within)), float(error)


@torch.no_grad()
def probe(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    prefixes: int = 4,
    continuations: int = 4,
    batch: int = 512,
    seed: int = 0,
    schedule: ScaleSchedule | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """Measure, for every step, how much of the reward its state has decided.

    For each step, ``prefixes`` states of every prompt are drawn and each goes on ``continuations`` times from its
    caches; pictures that the reward fails on drop their prompt from that step's measurement.

    Args:
        batch: pictures drawn at once, but at least those of one prompt; it changes nothing but rounding.

    Raises:
        ValueError: if there are fewer than two prompts, prefixes or continuations, or a step keeps fewer prompts.
    """
    check_counts(len(prompts), prefixes, continuations)
    each = prefixes * continuations
    together = max(batch // each, 1)
    parts = [slice(first, min(first + together, len(prompts))) for first in range(0, len(prompts), together)]
    conditions = [policy.condition(prompts[part], schedule) for part in parts]
    schedule = conditions[0].schedule
    generators = row_generators((seed, 0), len(prompts), conditions[0].device)
    entropy = torch.cat(
        [_entropy(policy, c, sampling, generators[part]) for c, part in zip(conditions, parts, strict=True)]
    )
    entropies = [float(part.mean()) for part in entropy.split(list(schedule.counts), 1)]
    reports, failed = [], 0
    for m in range(1, len(schedule)):
        first = row_generators((seed, m, 0), len(prompts) * prefixes, conditions[0].device)
        second = row_generators((seed, m, 1), len(prompts) * each, conditions[0].device)
        found = []
        for condition, part in zip(conditions, parts, strict=True):
            heads, own = condition.repeat(prefixes), slice(part.start * prefixes, part.stop * prefixes)
            start = rollout(policy, heads, sampling, first[own], until=m, keep_state=True)
            own = slice(part.start * each, part.stop * each)
            whole = rollout(policy, heads, sampling, second[own], start=start, fork=continuations)
            shown = [prompt for prompt in prompts[part] for _ in range(each)]
            found.append(reward(policy.decode(whole.actions, schedule).float().cpu(), shown))
        wrong = torch.cat([output.failed for output in found])
        failed += int(wrong.sum())
        scores = torch.cat([output.score for output in found]).view(len(prompts), prefixes, continuations)
        share, error = decided_share(scores[~wrong.view(len(prompts), -1).any(1)])
        reports.append(_report(schedule, m, share, error, entropies))
        progress(m, len(schedule) - 1)
    reports.append(_report(schedule, len(schedule), 1.0, 0.0, entropies))
    pictures = len(prompts) * each * (len(schedule) - 1)
    return Probe(schedule, reports, pictures, failed)


def _entropy(policy: Policy, condition: Condition, sampling: Sampling, rows: Sequence[torch.Generator]) -> Tensor:
    """Entropies of the tokens of one drawn sequence a row, [batch, tokens]."""
    sequence = rollout(policy, condition, sampling, rows)
    entropy = log_probs(policy, condition, sequence.actions, entropy=True).entropy
    assert entropy is not None
    return entropy


def _report(schedule: ScaleSchedule, m: int, share: float, error: float, entropies: list[float]) -> StepReport:
    h, w = schedule.grids[m - 1]
    left = 1 - schedule.prefix_tokens(m) / schedule.tokens
    return StepReport(m, float((h * w) ** 0.5), left, share, error, entropies[m - 1])
