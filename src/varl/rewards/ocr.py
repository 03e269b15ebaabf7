"""The OCR reward (arXiv 2601.02256, Eq. 11-15) and the word metrics that evaluation shares with it."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from varl.models.fields import fill
from varl.policy import Prompt
from varl.rewards.base import FailureLog, Polygon, RewardOutput
from varl.rewards.checks import checked_polygons, checked_text
from varl.rewards.engine import Line, OcrConfig, OcrEngine, Reading, TextReader, Unread
from varl.rewards.folding import folded_words
from varl.rewards.guard import Told, told, undisturbed
from varl.rewards.wanted import Legibility, check_alphabet, check_words, legibility
from varl.rewards.worker import OcrWorker

__all__ = [
    "OcrReward",
    "OcrScore",
    "character_similarity",
    "ned",
    "ocr_score",
    "word_accuracy",
    "word_hits",
    "word_neds",
]

Bag = Literal["l1", "one-sided"]
Repeated = Literal["literal", "one-to-one"]
Regions = Literal["all", "matched", "wanted"]
Recognised = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class OcrScore:
    """The reward of one picture and its terms: total = completeness + similarity - penalty, in [-0.6, 2]."""

    total: float
    completeness: float
    similarity: float
    penalty: float


def character_similarity(x: str, y: str, eps: float = 1e-5) -> float:
    """LD(x, y) = 1 - edit(x, y) / (max(|x|, |y|) + eps), in [0, 1] (Eq. 13)."""
    return 1 - Levenshtein.distance(x, y) / (max(len(x), len(y)) + eps)


def ocr_score(
    wanted: Sequence[str],
    recognised: Recognised,
    *,
    bag: Bag = "l1",
    repeated: Repeated = "literal",
    eps: float = 1e-5,
    confusables: Mapping[str, str] | None = None,
    fold: bool = True,
) -> OcrScore:
    """R = Comp + Sim - Pen for the words of one picture (Eq. 11-15, as docs/method.md settles them).

    Case is ignored; entries of several words are split at white space, and each word of a recognised line
    inherits the line's confidence. With N wanted words g, recognised words p with confidence s, nothing
    recognised giving 0:

    - Comp = 1/N sum over g of [g recognised] * the least confidence among the p equal to g
    - Sim = 1/N sum over g of LD(g, p*) * s*, p* the recognised word most like g (of equals the least
      confident)
    - Pen = 0.6 * BagDist / (characters of all g and all p); 0.6 when nothing is recognised

    Args:
        wanted: the texts the picture should contain.
        recognised: (text, confidence in [0, 1]) of each line or word that was read, in any order.
        bag: "l1": BagDist is the L1 distance of the two multisets of characters, so that Pen is 0 for equal
            and 0.6 for disjoint multisets; "one-sided": only wanted characters that are missing count, not
            what is too much.
        repeated: "literal": every wanted word is looked up by itself, so one recognised word can serve
            several; "one-to-one": a recognised word serves at most one wanted word, most similar (then most
            confident) pairs first, and a wanted word without a partner scores 0 in Comp and Sim.
        eps: keeps LD finite for empty words.
        confusables: characters to be read as others on both sides after folding, e.g. {"0": "o", "1":
            "l"}.
        fold: compare both sides folded (``varl.rewards.folding.fold``), so that ’ is ' and CAFÉ is itself however
            its accent is encoded; False: in lower case only, as the paper has it. For ASCII that is the same.

    Raises:
        ValueError: if no word is wanted, or an option is unknown.
    """
    if bag not in get_args(Bag) or repeated not in get_args(Repeated):
        raise ValueError(
            f"bag is one of {get_args(Bag)}, repeated one of {get_args(Repeated)}; got {bag!r}, {repeated!r}"
        )
    table = _table(confusables, fold)
    goal = [word.translate(table) for word in folded_words(wanted, fold) if word]
    if not goal:
        raise ValueError("a picture without wanted words has no OCR reward")
    found = [(word.translate(table), s) for text, s in recognised for word in folded_words([text], fold) if word]
    if not found:
        return OcrScore(-0.6, 0.0, 0.0, 0.6)
    if repeated == "literal":
        exact = [min((s for p, s in found if p == g), default=0.0) for g in goal]
        close = [max((character_similarity(g, p, eps), -s) for p, s in found) for g in goal]
        similar = [likeness * -s for likeness, s in close]
    else:
        exact, similar = _one_to_one(goal, found, eps)
    penalty = 0.6 * _bag_distance(goal, [p for p, _ in found], bag)
    completeness, similarity = sum(exact) / len(goal), sum(similar) / len(goal)
    return OcrScore(completeness + similarity - penalty, completeness, similarity, penalty)


def _one_to_one(goal: Sequence[str], found: Sequence[tuple[str, float]], eps: float) -> tuple[list[float], list[float]]:
    """Comp's and Sim's term of each wanted word when a recognised word may serve only one."""
    exact, similar = [0.0] * len(goal), [0.0] * len(goal)
    pairs = [(-character_similarity(g, p, eps), -s, i, j) for i, g in enumerate(goal) for j, (p, s) in enumerate(found)]
    taken_i: set[int] = set()
    taken_j: set[int] = set()
    for likeness, s, i, j in sorted(pairs):
        if i not in taken_i and j not in taken_j:
            taken_i.add(i)
            taken_j.add(j)
            similar[i] = likeness * s
            exact[i] = -s if goal[i] == found[j][0] else 0.0
    return exact, similar


def _bag_distance(goal: Sequence[str], found: Sequence[str], bag: Bag) -> float:
    """Distance of the two multisets of characters over all characters of both, in [0, 1]."""
    want, have = Counter("".join(goal)), Counter("".join(found))
    missing, extra = (want - have).total(), (have - want).total()
    return (missing if bag == "one-sided" else missing + extra) / (want.total() + have.total())


def _table(confusables: Mapping[str, str] | None, fold: bool) -> dict[int, str]:
    pairs = {}
    for old, new in (confusables or {}).items():
        if len(str(old)) != 1 or len(str(new)) != 1:
            raise ValueError(f"confusables map one character to one character, got {old!r}: {new!r}")
        key, value = ("".join(folded_words([str(one)], fold)) for one in (old, new))
        if len(key) != 1 or len(value) != 1:
            raise ValueError(f"confusables are compared folded, where {old!r}: {new!r} is {key!r}: {value!r}")
        pairs[ord(key)] = value
    return pairs


def word_hits(wanted: Sequence[str], recognised: Sequence[str], fold: bool = True) -> list[bool]:
    """For each wanted word, whether it occurs among the recognised ones (CVTG-2K: lower case, split at white
    space; literally so with ``fold`` False, else both sides are folded as in ``ocr_score``)."""
    have = set(filter(None, folded_words(recognised, fold)))
    return [word in have for word in folded_words(wanted, fold)]


def word_accuracy(wanted: Sequence[str], recognised: Sequence[str], fold: bool = True) -> float:
    """Share of wanted words among the recognised ones, in [0, 1]; NaN if none is wanted.

    For the micro-average over pictures, count ``word_hits``."""
    hits = word_hits(wanted, recognised, fold)
    return sum(hits) / len(hits) if hits else float("nan")


def word_neds(wanted: Sequence[str], recognised: Sequence[str], fold: bool = True) -> list[float]:
    """For each wanted word 1 - edit / (longer length + 1e-5) against the closest recognised word by difflib's
    ratio (cutoff 0), as CVTG-2K's evaluator has it; 0 if nothing was recognised. ``fold`` as for ``word_hits``."""
    have = set(filter(None, folded_words(recognised, fold)))
    return [character_similarity(word, _closest(word, have)) if have else 0.0 for word in folded_words(wanted, fold)]


def _closest(word: str, have: set[str]) -> str:
    """difflib's closest match (of equals the last by alphabet), computed only where its bounds leave a choice."""
    if word in have or len(have) == 1:
        return word if word in have else next(iter(have))
    matcher, best = difflib.SequenceMatcher(), (-1.0, "")
    matcher.set_seq2(word)
    for candidate in have:
        matcher.set_seq1(candidate)
        if matcher.real_quick_ratio() >= best[0] and matcher.quick_ratio() >= best[0]:
            best = max(best, (matcher.ratio(), candidate))
    return best[1]


def ned(wanted: Sequence[str], recognised: Sequence[str], fold: bool = True) -> float:
    """Mean of ``word_neds``, in [0, 1], higher is better; NaN if no word is wanted."""
    scores = word_neds(wanted, recognised, fold)
    return sum(scores) / len(scores) if scores else float("nan")


@dataclass(frozen=True)
class _Plain:
    """Options that a command line may give as text."""

    timeout_s: float | None = None
    eps: float = 1e-5
    fold: bool = True


class OcrReward:
    """Scores pictures by whether the prompt's words can be read in them.

    Args:
        engine: settings of the built-in engine (an ``OcrConfig`` or its fields), or a reader of one's own. Whatever
            that raises fails pictures, as with any code of one's own; lines of more than ``MOST_CHARACTERS`` in all, or
            polygons that are none, fail theirs.
        timeout_s: None: the engine runs in this process. A number of seconds: it runs in a process of its
            own, which is restarted when it crashes or takes longer than this over a picture (``OcrWorker``).
        regions: which polygons are reported for mask propagation. "all": every line found; "matched": lines
            that contain a wanted word; "wanted": every line found, and the prompt's own boxes.
        bag, repeated, eps, confusables, fold: see ``ocr_score``.

    Attributes:
        failures: how many pictures could not be scored so far, and why.

    Raises:
        ValueError, TypeError: at an unknown or invalid option.
    """

    def __init__(
        self,
        engine: OcrConfig | Mapping[str, Any] | TextReader | None = None,
        *,
        timeout_s: float | None = None,
        regions: Regions = "all",
        bag: Bag = "l1",
        repeated: Repeated = "literal",
        eps: float = 1e-5,
        confusables: Mapping[str, str] | None = None,
        fold: bool = True,
    ) -> None:
        if regions not in get_args(Regions):
            raise ValueError(f"regions is one of {get_args(Regions)}, got {regions!r}")
        if confusables is not None and not isinstance(confusables, Mapping):
            raise ValueError(f'confusables is a mapping of characters, e.g. {{"0": "o"}}, got {confusables!r}')
        plain = fill(_Plain, {"timeout_s": timeout_s, "eps": eps, "fold": fold}, "options")
        if not 0 <= plain.eps <= 1:
            raise ValueError(f"eps must be from 0 to 1, got {plain.eps}")
        self.regions, self.fold = regions, plain.fold
        self.options: dict[str, Any] = {
            "bag": bag,
            "repeated": repeated,
            "eps": plain.eps,
            "confusables": dict(confusables or {}),
            "fold": plain.fold,
        }
        ocr_score(["a"], [], **self.options)  # options are checked before any work
        self._table = _table(confusables, self.fold)
        self.reader = _reader(engine, plain.timeout_s)
        self.failures = FailureLog("OCR reward")

    def describe(self) -> dict[str, str]:
        """The reward, its options, and what the engine says of itself."""
        options = {**self.options, "regions": self.regions}
        return {
            "reward": "ocr",
            "options": ", ".join(f"{k}={v}" for k, v in options.items()),
            **self.reader.describe(),
        }

    def compared(self, text: str) -> list[str]:
        """The words of a text as they are compared."""
        return [word.translate(self._table) for word in folded_words([text], self.fold) if word]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts whose words no picture could show to this engine.

        Raises:
            ValueError: if a prompt wants no words, or letters that are not in the recogniser's alphabet; naming it.
        """
        check_words(prompts, self.compared)
        alphabet = getattr(self.reader, "alphabet", lambda: None)()
        if alphabet is not None:
            known = {c for character in alphabet for c in "".join(self.compared(character))}
            check_alphabet(prompts, self.compared, known, self.reader.describe().get("rec_model", "the recogniser"))

    def legibility(self, prompts: Sequence[Prompt], most: int, seconds: float) -> Legibility | None:
        """Which of the prompts' words the engine does not read on a clean picture; None for a reader of one's own."""
        if getattr(self.reader, "alphabet", lambda: None)() is None:
            return None
        return legibility(self.reader, prompts, self.compared, most, seconds)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score [B, 3, H, W] pictures in [0, 1] against the ``words`` of B prompts.

        ``parts`` holds completeness, similarity, penalty and word_accuracy (NaN where failed); ``texts`` the
        words read. A picture that the engine could not read, or whose prompt wants no words, is failed.

        Raises:
            ValueError: if ``images`` has another shape, or there are not B prompts.
            RunError: if a process of the engine cannot be started even once.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        height, width = images.shape[-2:]
        names = ("score", "completeness", "similarity", "penalty", "word_accuracy")
        values = torch.full((len(names), len(prompts)), torch.nan)
        regions: list[list[Polygon]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        for i, (reading, prompt) in enumerate(zip(self._read(images), prompts, strict=True)):
            try:
                if isinstance(reading, Unread):
                    raise Told(reading.reason)
                texts[i] = checked_text(" ".join(line.text for line in reading))
                if not self.compared(" ".join(prompt.words)):
                    raise Told("the prompt wants no words")
                regions[i] = checked_polygons(self._regions(reading, prompt, width, height))
                values[:, i] = torch.tensor(self._terms(reading, prompt))
            except (Told, ValueError, TypeError, AttributeError) as error:  # of a reader of one's own
                self.failures.add(told(error))
                regions[i] = []
        parts = dict(zip(names[1:], values[1:], strict=True))
        return RewardOutput(values[0], values[0].isnan(), regions, parts, texts)

    def _read(self, images: Tensor) -> list[Reading]:
        """What the reader says of each picture; a reader of one's own may do anything."""
        if isinstance(self.reader, OcrEngine | OcrWorker):
            return self.reader.read(images)
        try:
            with undisturbed():
                readings = self.reader.read(images.clone())
                if len(readings) != len(images):
                    raise ValueError(f"a reader must answer for {len(images)} pictures, gave {len(readings)}")
                return list(readings)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return [Unread(told(error))] * len(images)

    def _terms(self, lines: Sequence[Line], prompt: Prompt) -> tuple[float, ...]:
        score = ocr_score(prompt.words, [(line.text, line.confidence) for line in lines], **self.options)
        accuracy = word_accuracy(prompt.words, [line.text for line in lines], self.fold)
        return score.total, score.completeness, score.similarity, score.penalty, accuracy

    def _regions(self, lines: Sequence[Line], prompt: Prompt, width: int, height: int) -> list[Polygon]:
        if self.regions == "matched":
            wanted = {word for text in prompt.words for word in self.compared(text)}
            lines = [line for line in lines if not wanted.isdisjoint(self.compared(line.text))]
        polygons = [line.polygon for line in lines]
        if self.regions == "wanted":
            size = np.array([width, height], np.float32)
            for x0, y0, x1, y1 in prompt.boxes:
                polygons.append(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32) * size)
        return polygons


def _reader(engine: OcrConfig | Mapping[str, Any] | TextReader | None, timeout_s: float | None) -> TextReader:
    if isinstance(engine, Mapping):
        unknown = sorted(set(engine) - {one.name for one in fields(OcrConfig)}, key=str)
        if unknown:
            raise TypeError(f"engine has no {', '.join(map(repr, unknown))}; it has {_ENGINE_FIELDS}")
        engine = fill(OcrConfig, engine, "engine")
    if engine is not None and not isinstance(engine, OcrConfig):
        if not callable(getattr(engine, "read", None)):
            raise ValueError(f"engine is a mapping of settings ({_ENGINE_FIELDS}) or a reader, got {engine!r:.100}")
        if timeout_s is not None:
            raise ValueError("timeout_s is for the built-in engine; a reader of your own has its own")
        return engine
    return OcrEngine(engine) if timeout_s is None else OcrWorker(engine, timeout_s=timeout_s)


_ENGINE_FIELDS = ", ".join(one.name for one in fields(OcrConfig))
