"""Prompts: from files, generated, filtered by the number of their text regions, and as an endless stream."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from varl.policy import Box, Policy, Prompt
from varl.schedule import ScaleSchedule

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

CHECKED_AT_ONCE = 32
# A straight single quote opens only where no letter is before it, and closes only where none is after it: `don't` and
# `the dogs' bowl` hold apostrophes, 'DON'T WALK' one text.
_OPEN = re.compile(r"""["“]|(?<!\w)‘|(?<!\w)'(?=[^\s'])""")
_CLOSE = {
    '"': re.compile('"'), "“": re.compile("”"), "‘": re.compile(r"’(?!\w)"), "'": re.compile(r"(?<=\S)'(?!\w)")
}  # fmt: skip
_MOST_LABELS = 1_000_000
_FIELDS = ("text", "words", "boxes", "label")
_RIGHT = {
    ".json": 'CVTG-2K\'s format is {"data_list": [{"prompt": "... \'SALE\' ..."}, ...]}',
    ".jsonl": 'a line is for example {"text": "a sign that says \'SALE\'", "words": ["SALE"]}',
}


def quoted_words(text: str) -> tuple[str, ...]:
    """The texts in pairs of single or double quotes, straight or curly, in order; one entry a region.

    A quote inside another pair is part of the outer text; apostrophes are not quotes; blank pairs are left out. Single
    quotes pair within a line.
    """
    found: list[str] = []
    at, barren = 0, dict.fromkeys(_CLOSE, 0)  # no quote of a kind closes before its place in ``barren``: time is linear
    while opening := _OPEN.search(text, at):
        kind, at = opening[0], opening.end()
        if at <= barren[kind]:
            continue
        line_end = text.find("\n", at) if kind in "'‘" else -1
        end = len(text) if line_end < 0 else line_end
        closing = _CLOSE[kind].search(text, at, end)
        if closing is None:
            barren[kind] = end
            continue
        found.append(text[at : closing.start()].strip())
        at = closing.end()
    return tuple(word for word in found if word)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts (UTF-8); nothing in it is executed.

    - ``.jsonl``: an object a line, with ``text``, and if wanted ``words`` (list of texts), ``boxes`` (one
      [left, top, right, bottom] a word, as fractions of the picture) and ``label`` (class index). Without ``words``,
      the quoted parts of the text are the wanted words; ``text`` may be missing where there is a label.
    - ``.json``: CVTG-2K's format, ``{"data_list": [{"prompt": ...}, ...]}``; words as for text files.
    - any other ending: a prompt a line, blank lines left out; the wanted words are ``quoted_words`` of the prompt.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not UTF-8, holds no prompt, or a line or entry is not of its format;
            the message names it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8: {error}") from error
    if path.suffix == ".json":
        prompts = list(_from_cvtg(content, path))
    else:
        # Not splitlines(): it also splits at characters such as U+2028, which may be inside a prompt.
        lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        if path.suffix == ".jsonl":
            prompts = [_from_object(_parse(line, f"{path}, line {number}", ".jsonl"), f"{path}, line {number}")
                       for number, line in lines]  # fmt: skip
        else:
            prompts = [Prompt(line, quoted_words(line)) for _, line in lines]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt")
    return prompts


def _parse(content: str, where: str, suffix: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or nesting without end
        line = f", line {error.lineno}" if suffix == ".json" and isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where}{line}: not valid JSON ({reason}); {_RIGHT[suffix]}") from error


def _from_cvtg(content: str, path: Path) -> Iterator[Prompt]:
    data = _parse(content, str(path), ".json")
    entries = data.get("data_list") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path} has no list 'data_list'; {_RIGHT['.json']}")
    for number, entry in enumerate(entries):
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not _is_text(text) or not text.strip():
            raise ValueError(f"{path}, data_list[{number}] has no text 'prompt'; {_RIGHT['.json']}")
        yield Prompt(text, quoted_words(text))


def _from_object(data: Any, where: str) -> Prompt:
    def need(good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"{where}: {what}; {_RIGHT['.jsonl']}")

    need(isinstance(data, dict), f"expected an object, got {type(data).__name__}")
    unknown = sorted(set(data) - set(_FIELDS))
    need(not unknown, f"unknown field {', '.join(unknown)} (fields are {', '.join(_FIELDS)})")
    text, label = data.get("text", ""), data.get("label")
    need(_is_text(text), f"text must be a string, got {text!r}")
    is_label = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < _MOST_LABELS
    need(label is None or is_label, f"label must be a class index, got {label!r}")
    need(bool(text.strip()) or label is not None, "there is neither a text nor a label")
    words = data.get("words")
    if words is None:
        words = quoted_words(text)
    listed = isinstance(words, list | tuple) and all(_is_text(w) and w.strip() for w in words)
    need(listed, f"words must be a list of texts, got {words!r}")
    boxes = data.get("boxes") or []
    need(isinstance(boxes, list) and all(map(_is_box, boxes)), "boxes must be a list of [left, top, right, bottom], "
         f"with 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {boxes!r}")  # fmt: skip
    need(len(boxes) in (0, len(words)), f"there are {len(boxes)} boxes for {len(words)} words")
    typed: list[Box] = [(float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in boxes]
    return Prompt(text, tuple(words), tuple(typed), label)


def _is_text(value: Any) -> bool:
    """Whether it is a string without halves of surrogate pairs, which JSON can spell but nothing can write."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1


class PromptStream:
    """An endless shuffled stream over a list of prompts, which a resumed run takes up where it stopped.

    Every epoch gives each prompt once, in a new order drawn from (seed, epoch). A batch holds no prompt twice, unless
    it is larger than the list: where a batch ends one epoch and begins the next, prompts that it holds already come
    later in the new epoch.

    Args:
        prompts: what to draw from.
        seed: of the orders.

    Attributes:
        position: how many prompts were drawn so far.

    Raises:
        ValueError: if there is no prompt.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 0) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt, got none")
        self.prompts, self.seed = list(prompts), seed
        self.position = 0
        # What the batch that began this epoch took from it; all else about the order follows from (seed, epoch).
        self._head: list[int] = []
        self._order = self._epoch_order()

    @property
    def epoch(self) -> int:
        """Which pass over the prompts the next one belongs to, from 0."""
        return self.position // len(self.prompts)

    def next(self, n: int) -> list[tuple[int, Prompt]]:
        """The next ``n`` prompts, each with its number in the stream (0, 1, 2, ... over all epochs), for seeding.

        Raises:
            ValueError: if ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError(f"a batch needs at least one prompt, got {n}")
        size = len(self.prompts)
        batch: list[int] = []
        for drawn in range(n):
            if self.position % size == 0:
                # Prompts drawn before a whole number of lists are repeated anyway.
                seen = set(batch[drawn - drawn % size :])
                self._head = []
                fresh = [i for i in self._epoch_order() if i not in seen]
                self._head = fresh[: n - drawn] if seen else []
                self._order = self._epoch_order()
            batch.append(self._order[self.position % size])
            self.position += 1
        return [(self.position - n + drawn, self.prompts[i]) for drawn, i in enumerate(batch)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain numbers, fit for JSON."""
        return {
            "position": self.position, "head": list(self._head), **self._identity()
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()`` of a stream over the same prompts.

        Raises:
            ValueError: if the state is of a stream with another seed or other prompts.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"the stream to resume had {name} {state[name]}, this one has {value}; they must agree"
                )
        self.position, self._head = int(state["position"]), list(state["head"])
        # At the end of an epoch the order is that of the epoch to come, which next() draws.
        self._order = self._epoch_order()

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr(self.prompts).encode()).hexdigest()
        return {"seed": self.seed, "prompts": len(self.prompts), "digest of the prompts": digest}

    def _epoch_order(self) -> list[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.prompts)).tolist()
        taken = set(self._head)
        return self._head + [i for i in order if i not in taken]


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
        raise ValueError(f"labels go up to {_MOST_LABELS - 1}; got labels:{span}")
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


def check_prompts(policy: Policy, prompts: Sequence[Prompt], schedule: ScaleSchedule) -> None:
    """Condition on every prompt, a few at a time, so that one that cannot be drawn is found before work starts.

    Raises:
        ValueError: if the policy takes no condition from a prompt.
    """
    for first in range(0, len(prompts), CHECKED_AT_ONCE):
        policy.condition(prompts[first : first + CHECKED_AT_ONCE], schedule)
