"""Prompts: from files, generated, filtered by the number of their text regions, and as an endless stream."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from varl.policy import Prompt
from varl.prompts.check import check_prompts
from varl.prompts.files import MOST_LABELS, load_prompts
from varl.prompts.quotes import quoted_words
from varl.prompts.stream import PromptStream

__all__ = [
    "PromptStream",
    "check_prompts",
    "inkling_prompts",
    "label_prompts",
    "load_prompts",
    "quoted_words",
    "resolve_prompts",
    "with_region_counts",
]


def with_region_counts(prompts: Sequence[Prompt], target: Mapping[int, float], seed: int = 0) -> list[Prompt]:
    """The most prompts whose numbers of text regions (``len(words)``) follow a distribution (paper, appendix C).

    Args:
        prompts: to choose from.
        target: share of each number of regions, e.g. ``{2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}``; scaled to sum 1. Prompts
            with another number are left out.
        seed: which prompts stay, where there are too many.

    Returns:
        A random subset, in the given order. Each share is met to within one prompt.

    Raises:
        ValueError: if a share is negative or not finite, all are 0, or no prompt has a number that is asked for.
    """
    if any(not 0 <= share < math.inf for share in target.values()) or not sum(target.values()) > 0:
        raise ValueError(f"region counts need shares of at least 0 that are not all 0, got {dict(target)}")
    total_share = math.fsum(target.values())
    shares = {count: share / total_share for count, share in sorted(target.items()) if share > 0}
    having = {count: [i for i, p in enumerate(prompts) if len(p.words) == count] for count in shares}
    for count, found in having.items():
        if not found:
            there = sorted({len(p.words) for p in prompts})
            raise ValueError(f"no prompt has {count} text regions; the prompts have {', '.join(map(str, there))}")
    # Rounded because 3 / 0.3 is 10.000000000000002 or 9.99...; a share is met to within one prompt either way.
    total = math.floor(min(round(len(having[count]) / share, 6) for count, share in shares.items()))
    exact = {count: round(total * share, 6) for count, share in shares.items()}
    quota = {count: math.floor(value) for count, value in exact.items()}
    by_remainder = sorted(exact, key=lambda count: quota[count] - exact[count])
    for count in by_remainder[: total - sum(quota.values())]:
        quota[count] += 1
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(having[count], size=quota[count], replace=False) for count in shares]
    return [prompts[i] for i in np.sort(np.concatenate(chosen))]


def inkling_prompts(count: int, seed: int = 0, held_out: bool = False) -> list[Prompt]:
    """Generated prompts for Inkling, no two alike.

    Args:
        count: how many.
        seed: the same seed gives the same prompts; a larger count only adds to them.
        held_out: words that Inkling was never trained on, or only words that it may be trained on.

    Raises:
        ValueError: if ``count`` is less than 1.
    """
    from varl.models.inkling.text import make_prompt, random_regions

    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng((seed, int(held_out)))
    found: dict[str, Prompt] = {}
    while len(found) < count:
        prompt = make_prompt(random_regions(rng, held_out))
        found.setdefault(prompt.text, prompt)
    return list(found.values())


def label_prompts(span: str) -> list[Prompt]:
    """One prompt for each class of a span such as ``0-999``, both ends included, for class-conditional families.

    Raises:
        ValueError: if the span is none.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", span)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"labels are given as first-last, for example labels:0-999; got labels:{span}")
    if len(match[2]) > 6:
        raise ValueError(f"labels go up to {MOST_LABELS - 1}; got labels:{span}")
    return [Prompt(label=label) for label in range(int(match[1]), int(match[2]) + 1)]


def resolve_prompts(
    source: str | Path,
    *,
    count: int = 512,
    seed: int = 0,
    region_counts: Mapping[int, float] | None = None,
) -> list[Prompt]:
    """The prompts that a recipe names.

    Args:
        source: a file for ``load_prompts``; ``inkling:train`` or ``inkling:held-out`` for generated ones; or
            ``labels:0-999``, one prompt a class.
        count: how many prompts to generate; ignored for files, which give all of theirs.
        seed: of generated prompts and of ``region_counts``.
        region_counts: then keep what follows this distribution of text regions, see ``with_region_counts``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is unknown, the file or the distribution is not right.
    """
    name = str(source)
    if name in ("inkling:train", "inkling:held-out"):
        prompts = inkling_prompts(count, seed, name == "inkling:held-out")
    elif name.startswith("labels:"):
        prompts = label_prompts(name.removeprefix("labels:"))
    elif name.startswith("inkling:"):
        raise ValueError(f"no prompts {name!r}; there are inkling:train, inkling:held-out, and paths of prompt files")
    else:
        prompts = load_prompts(source)
    return prompts if region_counts is None else with_region_counts(prompts, region_counts, seed)
