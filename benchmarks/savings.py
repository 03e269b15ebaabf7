"""What each saving gives: a whole update with that saving taken away, over the update with all of them."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import Row, Settings, generators, timed
from benchmarks.shapes import Bench, Kind, extent, paper
from varl.learner import Batch
from varl.policy import Condition, Policy
from varl.rollout import Rollout, rollout
from varl.sampling import Sampling, filter_logits
from varl.scoring import log_probs

__all__ = ["SAVINGS", "TITLE", "Saving", "all_classes_sorted", "rows"]

TITLE = "savings: a whole update with one saving taken away, over that with all (baseline / ours)"


def _drawn_again() -> AbstractContextManager[Any]:
    """Every continuation draws its prefix anew, from the first grid on."""

    def from_scratch(policy: Policy, condition: Condition, *arguments: Any, **options: Any) -> Rollout:
        start, fork = options.get("start"), options.get("fork", 1)
        if start is not None:
            own = generators(policy, (0,), len(start) * fork)
            rollout(policy, start.condition.repeat(fork), arguments[0], own, until=start.steps, keep_state=True)
        return rollout(policy, condition, *arguments, **options)

    return patch("varl.updates.rollout", from_scratch)


@contextmanager
def _whole_sequences(bench: Bench) -> Iterator[None]:
    """Policy and reference compute all steps, whichever are asked for."""
    models = [m for m in (bench.trainer.policy, bench.trainer.reference) if m is not None]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patch.object(model, "hidden", _of_all_steps(model.hidden)))
        yield


def _of_all_steps(hidden: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def whole(condition: Condition, actions: Tensor, steps: range, prefix: Any = None) -> Tensor:
        schedule = condition.schedule
        unknown = actions.new_zeros(len(actions), schedule.tokens - actions.shape[1], *actions.shape[2:])
        return hidden(condition, torch.cat([actions, unknown], 1), range(len(schedule)))[:, schedule.span(steps)]

    return whole


def _learning(bench: Bench, before: Callable[[Batch], Batch]) -> AbstractContextManager[Any]:
    """Do something to the batch before it is learnt from."""
    learn = bench.trainer.learner.learn
    return patch.object(bench.trainer.learner, "learn", lambda batch, *rest: learn(before(batch), *rest))


def _prefix_each(bench: Bench) -> AbstractContextManager[Any]:
    """Every sequence of a suffix group computes the prefix for itself."""
    return patch.object(bench.trainer, "_shared", lambda plan: 1)


@contextmanager
def _old_pass(bench: Bench) -> Iterator[None]:
    """The old log-probabilities come from a pass of their own."""
    trainer = bench.trainer

    @torch.no_grad()
    def scored(batch: Batch) -> Batch:
        sequences, size = batch.sequences, trainer.learner.micro_batch
        for part in torch.arange(len(sequences)).split(size):
            shared = min(batch.shared, len(part))
            log_probs(
                trainer.policy, sequences.condition.select(part), sequences.actions[part], batch.steps, shared=shared
            )
        return batch

    with _learning(bench, scored):
        yield


def all_classes_sorted(logits: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p over all classes."""
    kept = filter_logits(logits, replace(sampling, top_p=1.0))
    return filter_logits(kept, Sampling(top_p=sampling.top_p))


def _a_number_a_class(logits: Tensor, own: list[torch.Generator]) -> Tensor:
    """One draw a position by the exponential race, which takes a random number for every class."""
    times = torch.empty_like(logits)
    for row, generator in zip(times, own, strict=True):
        row.exponential_(generator=generator)
    return (logits.softmax(-1) / times).argmax(-1)


@dataclass(frozen=True)
class Saving:
    """What is saved, for which kinds of update, and how a bench does without it."""

    name: str
    kinds: tuple[Kind, ...]
    without: Callable[[Bench], AbstractContextManager[Any]]


BOTH: tuple[Kind, ...] = ("prefix", "suffix")
SAVINGS = (
    Saving("a prefix update computes no suffix token", ("prefix",), _whole_sequences),
    Saving("continuations fork the drawn prefix", BOTH, lambda bench: _drawn_again()),
    Saving("a suffix group computes its prefix once", ("suffix",), _prefix_each),
    Saving("no pass for the old log-probabilities", BOTH, _old_pass),
    Saving("entropies of 32 tokens a step", BOTH, lambda bench: patch("varl.learner.WATCHED", 10**9)),
    Saving(
        "top-p looks at what top-k left",
        BOTH,
        lambda bench: patch("varl.rollout.filter_logits", all_classes_sorted),
    ),
    Saving("one random number a token", BOTH, lambda bench: patch("varl.rollout.draw", _a_number_a_class)),
)


def rows(settings: Settings, folder: Path) -> list[Row]:
    """Both kinds of update, at VAR's width; and what a fork costs beside the continuations it starts."""
    one, group = extent(settings), 8 if settings.full else 2
    config = one.config(paper()) if settings.short else one.config(paper(), group=group)
    bench, found = Bench(config, settings, folder, decoder=False), []
    for kind in BOTH:
        found += _kind_rows(bench, kind, settings, f"{one.name}: {kind} update")
    found.append(_fork_row(bench, settings))
    return found if settings.short or settings.device != "cpu" else [*found, _freed_row(settings)]


def _kind_rows(bench: Bench, kind: Kind, settings: Settings, group: str) -> list[Row]:
    savings = [saving for saving in SAVINGS if kind in saving.kinds]
    with_all: list[float] = []
    each: dict[str, list[float]] = {saving.name: [] for saving in savings}
    for turn in range(1 + settings.rounds):
        seconds = bench.step(kind).seconds
        with_all += [seconds] if turn else []  # the first one warms up
        for saving in savings:
            if turn:
                with saving.without(bench):
                    each[saving.name].append(bench.step(kind).seconds)
    return [Row.speedup(group, name, with_all, seconds, "without / with") for name, seconds in each.items()]


def _fork_row(bench: Bench, settings: Settings) -> Row:
    """The most that forking without a copy could give: the copy's seconds over those of the drawing that follows."""
    trainer, plan = bench.trainer, bench.plan("prefix")
    sampling, tails = trainer.config.sampling, plan.tails
    condition = trainer.policy.condition(bench.prompts(), trainer.schedule).repeat(plan.heads)
    first, second = (generators(trainer.policy, (settings.seed,), count * condition.batch) for count in (1, tails))
    prefix = rollout(trainer.policy, condition, sampling, first, until=plan.branch_at, keep_state=True)
    forks, drawing = [], []
    for _ in range(settings.rounds):
        forks.append(timed(lambda: prefix.state.fork(tails), settings.device))
        drawing.append(
            timed(
                lambda: rollout(trainer.policy, condition, sampling, second, start=prefix, fork=tails), settings.device
            )
        )
    text = "the copy / drawing all continuations, copy included"
    return Row.share("forking the caches", f"{condition.batch} prefixes, {tails} each", "s", forks, drawing, text)


DECODING = """
import sys, time, torch
from benchmarks.shapes import var_shaped
from varl import Sampling, load_policy
from varl.config import MethodConfig
from varl.memory import keep_freed

threads, seed, kept = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(seed)
if kept:
    keep_freed()
policy = load_policy("var", var_shaped(256, 64, 1, method=MethodConfig(), sampling=Sampling()).policy.config, "random")
actions = torch.randint(policy.classes, (4, policy.default_schedule.tokens))
for turn in range(6):
    start = time.perf_counter()
    policy.decode(actions)
    if turn:
        print(time.perf_counter() - start)
"""


def _freed_row(settings: Settings) -> Row:
    """Decoding with memory kept and given back, in processes of their own: malloc does not forget what it was told."""
    found: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(settings.rounds):
        for kept, seconds in found.items():
            words = [sys.executable, "-c", DECODING, *map(str, (settings.threads, settings.seed, kept))]
            printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            seconds.append(statistics.median(map(float, printed.split())))
    return Row.speedup(
        "decoding 4 pictures of 256 px, small tokenizer", "freed memory is kept", found[1], found[0], "without / with"
    )
