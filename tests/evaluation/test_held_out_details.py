"""Held-out evaluation, detail by detail: processes that share the pictures, spellings, precision, records, captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import varl
from small import make_inkling, make_prompts
from varl import Prompt, Sampling, rollout
from varl.distributed import Distributed
from varl.errors import RunError
from varl.evaluation.held_out import Estimate, Evaluation, comparison_table, evaluate, paired_difference
from varl.models.inkling import Inkling
from varl.rewards import RewardOutput
from varl.rewards.ocr import word_neds
from varl.rollout import row_generators


class Reads:
    """Scores pictures by their brightness, and reads one text after another; None is a picture that fails."""

    def __init__(self, texts: Sequence[str | None] = ()) -> None:
        self.texts, self.calls = list(texts), list[int]()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        self.calls.append(len(images))
        own = [self.texts.pop(0) if self.texts else "" for _ in prompts]
        failed = torch.tensor([text is None for text in own])
        return RewardOutput(images.double().mean((1, 2, 3)), failed, texts=[text or "" for text in own])

    def describe(self) -> dict[str, str]:
        return {"reward": "reads", "version": "7"}


class Plain(Reads):
    """Reads nothing."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        return replace(super().__call__(images, prompts), texts=None)


@pytest.fixture(scope="module")
def policy() -> Inkling:
    return make_inkling()


def asked(*words: tuple[str, ...]) -> list[Prompt]:
    return [replace(prompt, words=own) for prompt, own in zip(make_prompts(len(words)), words, strict=True)]


class Two(Distributed):
    """Both of two processes, one after the other: what one gathers is there when the other has worked too.

    Here the other one's values come first or last as told; ``everywhere`` is kept.
    """

    def __init__(self, first: bool, scores: list[float], texts: list[str] | None) -> None:
        super().__init__()
        self.first, self.scores, self.texts = first, torch.tensor(scores), texts
        self.everywhere: list[bool] = []
        self.given: list[Any] = []

    def portion(self, items: int) -> range:
        return range(items // 2) if self.first else range(items // 2, items)

    def gather(self, rows: Tensor, everywhere: bool = True) -> Tensor:
        self.everywhere.append(everywhere)
        others = self.scores if rows.ndim == 1 else torch.full((len(self.scores), *rows.shape[1:]), 0.25)
        return torch.cat([rows, others] if self.first else [others, rows])

    def gather_values(self, value: Any) -> list[Any]:
        self.given.append(value)
        other = [len(self.scores), self.texts]
        return [value, other] if self.first else [other, value]


@pytest.mark.parametrize("first", [True, False])
def test_pictures_are_shared_and_results_put_together(policy: Inkling, first: bool) -> None:
    """Of four prompts each process has two; here the other one has read nothing, for its pictures have failed."""
    prompts = asked(("A",), ("B",), ("C",), ("D",))
    two = Two(first, [torch.nan, torch.nan], None)
    found = evaluate(policy, prompts, None, Reads(["a c", "d b"]), seed=1, batch=2, distributed=two)
    rows = range(2) if first else range(2, 4)
    generators = [row_generators((1, row), 1)[0] for row in rows]
    drawn = rollout(policy, policy.condition([prompts[row] for row in rows]), Sampling(), generators)
    mine = policy.decode(drawn.actions)
    torch.testing.assert_close(found.images[rows.start : rows.stop], mine)
    assert found.images.shape == (4, *mine.shape[1:])
    assert two.everywhere == [True, False]
    assert two.given == [[2, ["a c", "d b"]]]
    means = mine.double().mean((1, 2, 3)).float().tolist()
    nan = np.nan
    np.testing.assert_array_equal(found.rewards, np.float32([*means, nan, nan] if first else [nan, nan, *means]))
    assert found.rewards.dtype == np.float32
    assert found.texts == (["a c", "d b", "", ""] if first else ["", "", "a c", "d b"])
    np.testing.assert_array_equal(found.hits, [1, 1, nan, nan] if first else [nan, nan, 1, 1])  # type: ignore[arg-type]
    assert found.failed == 2


def test_if_no_process_has_read_there_are_no_texts(policy: Inkling) -> None:
    prompts = asked(("A",), ("B",))
    found = evaluate(policy, prompts, None, Plain(), seed=1, distributed=Two(True, [0.5], None))
    assert (found.texts, found.hits, found.neds) == (None, None, None)
    found = evaluate(policy, prompts, None, Plain(), seed=1, distributed=Two(True, [0.5], ["b"]))
    assert found.texts == ["", "b"]
    np.testing.assert_array_equal(found.hits, [0, 1])  # type: ignore[arg-type]


def test_each_batch_is_scored_by_its_own_pictures(policy: Inkling) -> None:
    reward = Reads()
    found = evaluate(policy, make_prompts(5), None, reward, seed=2, batch=2)
    assert reward.calls == [2, 2, 1]
    assert found.rewards.tolist() == found.images.double().mean((1, 2, 3)).float().tolist()
    assert len(set(found.rewards.tolist())) == 5
    reward = Reads()
    evaluate(policy, make_prompts(2), None, reward, seed=2, batch=1)
    assert reward.calls == [1, 1]


@pytest.mark.parametrize("given", [True, False])
def test_the_schedule_reaches_the_policy(policy: Inkling, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    """Inkling has one schedule only, so it is seen by what the policy is called with."""
    grids = policy.default_schedule.grids
    other = varl.ScaleSchedule(grids[:1] + grids[2:], policy.default_schedule.stride)
    schedule = other if given else policy.default_schedule
    condition, decode, seen = policy.condition, policy.decode, list[tuple[str, Any]]()

    def conditioned(prompts: Sequence[Prompt], *given: Any) -> Any:
        seen.append(("condition", given))
        return condition(prompts)

    def decoded(actions: Any, *given: Any) -> Tensor:
        seen.append(("decode", given))
        return decode(actions)

    monkeypatch.setattr(policy, "condition", conditioned)
    monkeypatch.setattr(policy, "decode", decoded)
    found = evaluate(policy, make_prompts(2), None, Reads(), seed=2, schedule=other if given else None)
    assert seen == [("condition", (schedule,)), ("decode", (schedule,))]
    assert found.made_by["schedule"] == schedule.describe()


READ = ["don\u2019t stop", "stra\u00dfe", "STRASSE"]
WANTED = [("DON'T",), ("strasse",), ("strasse",)]


@pytest.mark.parametrize(("fold", "hits"), [(None, [1, 1, 1]), (True, [1, 1, 1]), (False, [0, 0, 1])])
def test_words_are_folded_as_the_reward_folds_them(policy: Inkling, fold: bool | None, hits: list[int]) -> None:
    reward = Reads(READ)
    if fold is not None:
        reward.fold = fold  # type: ignore[attr-defined]
    found = evaluate(policy, asked(*WANTED), None, reward, seed=0)
    assert found.hits is not None
    assert found.hits.tolist() == hits
    wanted = [sum(word_neds(want, [read], fold is not False)) for want, read in zip(WANTED, READ, strict=True)]
    assert found.neds is not None
    assert found.neds.tolist() == wanted
    assert [similar == 1 for similar in wanted] == [bool(hit) for hit in hits]


def test_what_made_it(policy: Inkling) -> None:
    found = evaluate(policy, asked(("A",)), Sampling(top_k=3), Reads(["a"]), seed=9, samples_per_prompt=2)
    assert found.made_by == {
        "varl": varl.__version__,
        "torch": str(torch.__version__),
        "policy": "inkling",
        "schedule": policy.default_schedule.describe(),
        "sampling": {"guidance": 0.0, "top_k": 3, "top_p": 1.0, "temperature": 1.0},
        "seed": 9,
        "samples_per_prompt": 2,
        "interval": "95%, percentile bootstrap over prompts, 2000 resamples",
        "reward": {"reward": "reads", "version": "7"},
    }


def test_no_picture_that_could_be_scored(policy: Inkling) -> None:
    with pytest.raises(RunError, match=r"^none of the 2 pictures could be scored$"):
        evaluate(policy, asked(("A",)), None, Reads([None, None]), seed=0, samples_per_prompt=2)
    reward = Reads([None, None])
    reward.failures = None  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"^none of the 2 pictures could be scored$"):
        evaluate(policy, asked(("A",), ("B",)), None, reward, seed=0)
    with pytest.raises(ValueError, match=r"^an evaluation needs at least one prompt, got none$"):
        evaluate(policy, [], None, Reads(), seed=0)
    with pytest.raises(ValueError, match=r"^batch and samples_per_prompt must be at least 1, got 1 and 0$"):
        evaluate(policy, asked(("A",)), None, Reads(), seed=0, batch=1, samples_per_prompt=0)


def test_words_of_a_picture_that_failed_are_none(policy: Inkling) -> None:
    """Words that only it was to hold make no metrics; beside others they are not counted."""
    found = evaluate(policy, asked((), ("B",)), None, Reads(["a", None]), seed=0)
    assert (found.hits, found.neds, found.texts) == (None, None, ["a", ""])
    found = evaluate(policy, asked(("A",), ("B", "C")), None, Reads(["a", None]), seed=0)
    np.testing.assert_array_equal(found.hits, [1, np.nan])  # type: ignore[arg-type]
    np.testing.assert_allclose(found.neds, [1, np.nan], rtol=1e-5)  # type: ignore[arg-type]


def made(rewards: list[float], hits: list[float] | None, samples: int = 1, **made_by: Any) -> Evaluation:
    """Of prompts of two words each; similarities are half of the hits."""
    count = len(rewards) // samples
    prompts = [Prompt(f"p{i}", ("a", "b"), label=i) for i in range(count)]
    own = None if hits is None else np.array(hits)
    texts = None if hits is None else [f"read {i}" for i in range(len(rewards))]
    near = None if own is None else own / 2
    given = np.array(rewards, np.float32)
    return Evaluation(prompts, samples, torch.zeros(len(rewards), 3, 4, 4), texts, given, own, near, dict(made_by))


NAN = float("nan")


def test_sums_are_of_double_precision() -> None:
    above, below = made([2.0**25, 1.0], None, samples=2).totals("reward")
    assert (above.tolist(), below.tolist()) == ([2.0**25 + 1], [2])
    assert above.dtype == np.float64


def test_prompts_that_count_nothing_are_not_resampled() -> None:
    few = made([1.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    more = made([1.0, 2.0, 4.0, NAN, NAN], [0.0, 1.0, 2.0, NAN, NAN])
    for metric in ("word_accuracy", "ned", "reward"):
        assert more.estimate(metric) == few.estimate(metric)
    assert (few.reward, few.word_accuracy, few.ned) == tuple(map(few.estimate, ("reward", "word_accuracy", "ned")))
    assert few.ned is not None
    assert few.ned.value == 0.25
    bare = made([1.0, 2.0], None)
    assert (bare.word_accuracy, bare.ned, bare.metrics) == (None, None, ["reward"])
    later = made([2.0, 2.0, 4.0, 1.0, NAN], [1.0, 1.0, 2.0, 0.0, NAN])
    change = made([2.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    assert paired_difference(more, later, "ned") == paired_difference(few, change, "ned")


def test_a_record_whole() -> None:
    found = made([1.0, NAN, 3.0, 4.0], [2.0, NAN, 0.0, 1.0], samples=2, seed=3)
    record = found.to_dict()
    assert type(record["failed"]) is int
    assert record == {
        "metrics": {
            name: {"value": e.value, "low": e.low, "high": e.high}
            for name, e in ((name, found.estimate(name)) for name in ("word_accuracy", "ned", "reward"))
        },
        "prompts": 2,
        "pictures": 4,
        "failed": 1,
        "made_by": {"seed": 3},
        "per_prompt": [
            {
                "text": "p0", "words": ["a", "b"], "label": 0, "reward": [1.0, None], "wanted": 2,
                "hits": [2.0, None], "ned_sum": [1.0, None], "read": ["read 0", "read 1"],
            },
            {
                "text": "p1", "words": ["a", "b"], "label": 1, "reward": [3.0, 4.0], "wanted": 2,
                "hits": [0.0, 1.0], "ned_sum": [0.0, 0.5], "read": ["read 2", "read 3"],
            },
        ],
    }  # fmt: skip
    assert {type(value) for row in record["per_prompt"] for value in row["reward"]} == {float, type(None)}


def cells(table: Any) -> list[list[str]]:
    return [list(column.cells) for column in table.columns]


def test_tables_to_the_letter() -> None:
    one = made([1.0, 1.0], [1.0, 1.0], reward={"reward": "reads", "version": "7"})
    assert one._caption() == "2 prompts, 2 pictures\nreward reads; version 7"
    failing = made([1.0, NAN], [1.0, NAN])
    assert failing._caption() == "2 prompts, 2 pictures, 1 FAILED and left out\n"
    assert cells(one.table()) == [
        ["word accuracy", "NED", "reward"],
        ["0.5000", "0.2500", "1.0000"],
        ["0.5000 to 0.5000", "0.2500 to 0.2500", "1.0000 to 1.0000"],
    ]
    two = made([2.0, 2.0], [2.0, 2.0])
    assert cells(comparison_table(one, two)) == [
        ["word accuracy", "NED", "reward"],
        [str(one.estimate(name)) for name in ("word_accuracy", "ned", "reward")],
        [str(two.estimate(name)) for name in ("word_accuracy", "ned", "reward")],
        ["+0.5000 (+0.5000 to +0.5000)", "+0.2500 (+0.2500 to +0.2500)", "+1.0000 (+1.0000 to +1.0000)"],
    ]
    start = "2 prompts, 95% intervals by bootstrap over prompts"
    for before, after, end in (
        (one, two, ""),
        (one, failing, "; FAILED and left out: 0 before, 1 after"),
        (failing, one, "; FAILED and left out: 1 before, 0 after"),
        (failing, failing, "; FAILED and left out: 1 before, 1 after"),
    ):
        assert comparison_table(before, after).caption == start + end
    assert cells(comparison_table(made([1.0], None), made([1.0], [1.0])))[0] == ["reward"]
    assert str(Estimate(0.12345, -1.0, 2.0)) == "0.1235 (-1.0000 to 2.0000)"


def test_pairs_that_cannot_be_compared() -> None:
    words = (
        "evaluations can be compared on the same prompts in the same order only; these have 2 and 3 prompts and differ"
    )
    with pytest.raises(ValueError, match=f"^{words}$"):
        paired_difference(made([1.0, 2.0], None), made([1.0, 2.0, 3.0], None), "reward")
    with pytest.raises(ValueError, match=r"^no prompt has a NED in both evaluations$"):
        paired_difference(made([1.0, NAN], [1.0, NAN]), made([NAN, 1.0], [NAN, 1.0]), "ned")
    with pytest.raises(ValueError, match=r"^no metric 'ned' in this evaluation; there are reward$"):
        paired_difference(made([1.0], None), made([1.0], [1.0]), "ned")
