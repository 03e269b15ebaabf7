"""Held-out evaluation: draw a picture for every prompt, read it, and say how sure the averages are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from varl.distributed import Distributed
from varl.errors import RunError
from varl.policy import Policy, Prompt
from varl.rewards.base import Reward, RewardOutput
from varl.rewards.ocr import word_hits, word_neds
from varl.rollout import rollout, row_generators
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule

__all__ = ["Estimate", "Evaluation", "asked", "comparison_table", "evaluate", "paired_difference"]

RESAMPLES = 2000
METRICS = {"word_accuracy": "word accuracy", "ned": "NED", "reward": "reward"}
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, by bootstrap over prompts. One prompt alone gives an interval of no width."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass
class Evaluation:
    """What came of N prompts with S pictures each; of N S pictures, those of one prompt are adjacent.

    Attributes:
        prompts: the N prompts.
        samples_per_prompt: S.
        images: [N S, 3, H, W] float32 in [0, 1], on the CPU.
        texts: what was read in each picture, if the reward reads.
        rewards: [N S] float32; NaN where the picture could not be scored.
        hits: [N S] wanted words that were found; NaN where not scored. None if the reward does not read.
        neds: [N S] sum over wanted words of the similarity to the closest word read; NaN where not scored, or None.
        made_by: what made the numbers: versions, policy, sampling, seed, the reward's description.
    """

    prompts: list[Prompt]
    samples_per_prompt: int
    images: Tensor
    texts: list[str] | None
    rewards: Array
    hits: Array | None
    neds: Array | None
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Pictures that could not be scored; they are in no average."""
        return int(np.isnan(self.rewards).sum())

    @property
    def reward(self) -> Estimate:
        """Mean reward of the scored pictures."""
        return self.estimate("reward")

    @property
    def word_accuracy(self) -> Estimate | None:
        """Share of all wanted words that were read (CVTG-2K's micro-average), or None if nothing is read."""
        return None if self.hits is None else self.estimate("word_accuracy")

    @property
    def ned(self) -> Estimate | None:
        """Mean over all wanted words of 1 - edit distance / length, against the closest word read; or None."""
        return None if self.neds is None else self.estimate("ned")

    @property
    def metrics(self) -> list[str]:
        """Which metrics there are: of "word_accuracy", "ned" and "reward"."""
        return [name for name in METRICS if name == "reward" or self.hits is not None]

    def totals(self, metric: str) -> tuple[Array, Array]:
        """What a metric sums and counts for each prompt: numerator [N] and denominator [N] (0 if nothing was scored).

        Raises:
            ValueError: if there is no such metric here.
        """
        if metric not in self.metrics:
            raise ValueError(f"no metric {metric!r} in this evaluation; there are {', '.join(self.metrics)}")
        values = cast(Array, {"reward": self.rewards, "word_accuracy": self.hits, "ned": self.neds}[metric])
        each = np.ones(len(self.prompts)) if metric == "reward" else np.array([_wanted(p) for p in self.prompts])
        values = values.astype(np.float64).reshape(len(self.prompts), -1)
        return np.nansum(values, 1), each * np.isfinite(values).sum(1)

    def estimate(self, metric: str) -> Estimate:
        """A metric's mean: the sum over prompts of what it sums, by that of what it counts."""
        above, below = self.totals(metric)
        scored = below > 0
        return _bootstrap([(above[scored], below[scored])])

    def table(self) -> Table:
        """The metrics with their intervals, and how many pictures they rest on."""
        table = Table("metric", "mean", "95% interval", caption=Text(self._caption()), caption_justify="left")
        for name in self.metrics:
            e = self.estimate(name)
            table.add_row(METRICS[name], f"{e.value:.4f}", f"{e.low:.4f} to {e.high:.4f}")
        return table

    def _caption(self) -> str:
        failed = f", {self.failed} FAILED and left out" if self.failed else ""
        engine = "; ".join(f"{key} {value}" for key, value in self.made_by.get("reward", {}).items())
        return f"{len(self.prompts)} prompts, {len(self.rewards)} pictures{failed}\n{engine}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON holds it; NaN becomes None."""
        rows: list[dict[str, Any]] = []
        s = self.samples_per_prompt
        for i, prompt in enumerate(self.prompts):
            own = slice(i * s, (i + 1) * s)
            row: dict[str, Any] = {"text": prompt.text, "words": list(prompt.words), "label": prompt.label}
            row["reward"] = _numbers(self.rewards[own])
            if self.hits is not None and self.neds is not None and self.texts is not None:
                row |= {
                    "wanted": _wanted(prompt),
                    "hits": _numbers(self.hits[own]),
                    "ned_sum": _numbers(self.neds[own]),
                }
                row["read"] = self.texts[own]
            rows.append(row)
        return {
            "metrics": {name: asdict(self.estimate(name)) for name in self.metrics},
            "prompts": len(self.prompts),
            "pictures": len(self.rewards),
            "failed": self.failed,
            "made_by": self.made_by,
            "per_prompt": rows,
        }


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling | None,
    reward: Reward,
    *,
    seed: int,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
    samples_per_prompt: int = 1,
    schedule: ScaleSchedule | None = None,
    precision: AbstractContextManager[Any] | None = None,
    distributed: Distributed | None = None,
) -> Evaluation:
    """Draw pictures for prompts, score them, and average with 95% intervals.

    A picture's draws depend on (seed, number of its prompt, number of the sample) and on nothing else; another batch
    size changes it only where rounding of the logits flips a draw. Words are counted if the reward tells what it read
    (``RewardOutput.texts``); split at white space as CVTG-2K does, and folded (``varl.rewards.folding.fold``), which
    for ASCII is its lower case, or in lower case only where the reward has ``fold`` False.

    Args:
        policy: evaluated in eval mode, and left in the mode it was in.
        prompts: N prompts.
        sampling: how to draw; None is the policy's own distribution.
        reward: scores the pictures; what it cannot score is counted and in no average.
        seed: of the draws.
        batch: pictures drawn at once.
        progress: called with (pictures done, pictures in all) after every batch.
        samples_per_prompt: S, pictures for every prompt.
        schedule: the grids; by default the policy's default.
        precision: the policy draws and decodes inside it, for example ``torch.autocast``.
        distributed: the processes that share the pictures; all get the result, only the main one its pictures.

    Raises:
        ValueError: if there is no prompt, or a number is less than 1.
        RunError: if not one picture could be scored.
    """
    import varl

    if not prompts:
        raise ValueError("an evaluation needs at least one prompt, got none")
    if batch < 1 or samples_per_prompt < 1:
        raise ValueError(f"batch and samples_per_prompt must be at least 1, got {batch} and {samples_per_prompt}")
    module, s = cast(nn.Module, policy), samples_per_prompt
    sampling = sampling or Sampling()
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    distributed, schedule = distributed or Distributed(), schedule or policy.default_schedule
    images, outputs = [torch.zeros(0, 3, *schedule.image_size)], [RewardOutput.failed_like(0)]
    try:
        total = len(prompts) * s
        mine = distributed.portion(total)
        for first in range(mine.start, mine.stop, batch):
            rows = range(first, min(first + batch, mine.stop))
            shown = [prompts[row // s] for row in rows]
            with precision or nullcontext():
                condition = policy.condition(shown, schedule)
                own = [row_generators((seed, row // s), [row % s], condition.device)[0] for row in rows]
                drawn = rollout(policy, condition, sampling, own)
                images.append(policy.decode(drawn.actions, schedule).float().cpu())
            outputs.append(reward(images[-1], shown))
            if progress is not None:
                progress(rows.stop - mine.start, len(mine))
    finally:
        for part, training in modes:
            part.training = training
    # A batch that failed as a whole, here or in another process, does not say whether the reward reads.
    output = RewardOutput.joined(outputs)
    scores = distributed.gather(output.score.masked_fill(output.failed, torch.nan).float().cpu()).numpy()
    read = distributed.gather_values([len(mine), output.texts])
    reads = any(own for _, own in read)
    texts = [text for pictures, own in read for text in own or [""] * pictures] if reads else None
    if np.isnan(scores).all():
        reasons = getattr(getattr(reward, "failures", None), "reasons", {})
        why = f": {'; '.join(reasons)}" if reasons else ""
        raise RunError(f"none of the {total} pictures could be scored{why}")
    fold = bool(getattr(reward, "fold", True))
    counted = None if texts is None else _count([prompts[row // s] for row in range(total)], texts, scores, fold)
    return Evaluation(
        prompts=list(prompts),
        samples_per_prompt=s,
        images=distributed.gather(torch.cat(images), everywhere=False),
        texts=texts,
        rewards=scores,
        hits=None if counted is None else counted[0],
        neds=None if counted is None else counted[1],
        made_by={
            "varl": varl.__version__,
            "torch": str(torch.__version__),
            "policy": policy.family,
            "schedule": schedule.describe(),
            "sampling": asdict(sampling),
            "seed": seed,
            "samples_per_prompt": s,
            "interval": f"95%, percentile bootstrap over prompts, {RESAMPLES} resamples",
            "reward": dict(reward.describe()),
        },
    )


def paired_difference(before: Evaluation, after: Evaluation, metric: str = "word_accuracy") -> Estimate:
    """How much a metric rose from ``before`` to ``after``, on the prompts that were scored in both.

    The interval resamples prompts, the same ones for both sides, so that hard and easy prompts cancel out.

    Raises:
        ValueError: if the evaluations are of different prompts, no prompt was scored in both, or one has no such
            metric.
    """
    mine, theirs = asked(before.prompts), asked(after.prompts)
    if mine != theirs:
        raise ValueError(
            f"evaluations can be compared on the same prompts in the same order only; these have {len(mine)} and "
            f"{len(theirs)} prompts and differ"
        )
    sides = [before.totals(metric), after.totals(metric)]
    both = (sides[0][1] > 0) & (sides[1][1] > 0)
    if not both.any():
        raise ValueError(f"no prompt has a {METRICS[metric]} in both evaluations")
    return _bootstrap([(above[both], below[both]) for above, below in sides])


def comparison_table(before: Evaluation, after: Evaluation) -> Table:
    """Before, after and the paired difference of every metric that both have.

    Raises:
        ValueError: as ``paired_difference``.
    """
    failed = (
        f"; FAILED and left out: {before.failed} before, {after.failed} after" if before.failed + after.failed else ""
    )
    caption = f"{len(before.prompts)} prompts, 95% intervals by bootstrap over prompts{failed}"
    table = Table("metric", "before", "after", "difference", caption=caption, caption_justify="left")
    for name in before.metrics:
        if name in after.metrics:
            d = paired_difference(before, after, name)
            change = f"{d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
            table.add_row(METRICS[name], str(before.estimate(name)), str(after.estimate(name)), change)
    return table


def asked(prompts: Sequence[Prompt]) -> list[tuple[str, tuple[str, ...], int | None]]:
    """What prompts ask for: by this, evaluations are of the same prompts or not."""
    return [(prompt.text, prompt.words, prompt.label) for prompt in prompts]


def _wanted(prompt: Prompt) -> int:
    return sum(len(word.split()) for word in prompt.words)


def _count(shown: Sequence[Prompt], texts: Sequence[str], scores: Array, fold: bool) -> tuple[Array, Array] | None:
    """Hits and summed NED of every picture, NaN where it was not scored; None if no scored prompt wants words."""
    scored = [row for row, score in enumerate(scores) if not np.isnan(score)]
    if not any(_wanted(shown[row]) for row in scored):
        return None
    hits, neds = np.full(len(texts), np.nan), np.full(len(texts), np.nan)
    for row in scored:
        hits[row] = sum(word_hits(shown[row].words, [texts[row]], fold))
        neds[row] = sum(word_neds(shown[row].words, [texts[row]], fold))
    return hits, neds


def _numbers(values: Array) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


def _bootstrap(sides: Sequence[tuple[Array, Array]]) -> Estimate:
    """sum(above) / sum(below), or with two sides the second less the first, with a 95% percentile interval over
    prompts.

    The resampling is seeded by nothing but the number of prompts, so that equal results give equal intervals.
    """
    prompts = len(sides[0][0])
    counts = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    values, draws = [], []
    for above, below in sides:
        values.append(above.sum() / below.sum())
        draws.append((counts @ above) / (counts @ below))
    value, spread = (values[0], draws[0]) if len(sides) == 1 else (values[1] - values[0], draws[1] - draws[0])
    low, high = np.percentile(spread, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high))
