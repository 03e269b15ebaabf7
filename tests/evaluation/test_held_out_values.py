"""Held-out evaluation, number by number: what every argument changes, and what the records and tables hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from signatures import defaults
from small import make_inkling, make_prompts
from varl import Prompt, Sampling, rollout
from varl.distributed import Distributed
from varl.errors import RunError
from varl.evaluation import held_out
from varl.evaluation.held_out import Evaluation, comparison_table, evaluate, paired_difference
from varl.models.inkling import Inkling
from varl.rewards import RewardOutput
from varl.rollout import row_generators

WORDS = [("KEBA", "LUX MAP"), ("RUN",), ("SET", "ZEN"), ()]


class Reader:
    """Scores pictures 0, 1, 2... and reads the texts it is given; None is a picture that fails."""

    def __init__(self, texts: Sequence[str | None] | None) -> None:
        self.texts, self.calls = texts, list[tuple[int, list[Prompt]]]()
        self.seen = 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        self.calls.append((len(images), list(prompts)))
        rows = range(self.seen, self.seen + len(images))
        self.seen += len(images)
        failed = torch.tensor([self.texts is not None and self.texts[row] is None for row in rows])
        texts = None if self.texts is None else [self.texts[row] or "" for row in rows]
        return RewardOutput(torch.tensor([float(row) for row in rows]), failed, texts=texts)

    def describe(self) -> dict[str, Any]:
        return {"reward": "reader", "version": 7}


@pytest.fixture(scope="module")
def policy() -> Inkling:
    return make_inkling()


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return [replace(prompt, words=words) for prompt, words in zip(make_prompts(4), WORDS, strict=True)]


def shown(table: Any) -> str:
    console = Console(record=True, width=160)
    console.print(table)
    return console.export_text()


def test_pictures_are_drawn_by_prompt_and_sample(policy: Inkling, asked: list[Prompt]) -> None:
    """Sample s of prompt p is drawn by generator s of the seed (seed, p), with the sampling that was asked for."""
    sampling = Sampling(guidance=1.0, top_k=5)
    reader, seen = Reader(None), list[tuple[int, int]]()
    found = evaluate(
        policy, tuple(asked[:3]), sampling, reader, seed=5, batch=4, samples_per_prompt=2,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    rows = [prompt for prompt in asked[:3] for _ in range(2)]
    generators = [row_generators((5, p), 2)[s] for p in range(3) for s in range(2)]
    drawn = rollout(policy, policy.condition(rows), sampling, generators)
    torch.testing.assert_close(found.images, policy.decode(drawn.actions))
    assert reader.calls == [(4, rows[:4]), (2, rows[4:])]
    assert seen == [(4, 6), (6, 6)]
    assert (found.samples_per_prompt, found.prompts) == (2, asked[:3])
    assert found.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.made_by["sampling"] == {"guidance": 1.0, "top_k": 5, "top_p": 1.0, "temperature": 1.0}
    assert (found.made_by["seed"], found.made_by["samples_per_prompt"]) == (5, 2)
    assert found.made_by["policy"] == "inkling"
    assert found.made_by["reward"] == {"reward": "reader", "version": 7}
    assert found.made_by["torch"] == str(torch.__version__)
    assert found.made_by["schedule"] == policy.default_schedule.describe()
    assert found.made_by["interval"] == "95%, percentile bootstrap over prompts, 2000 resamples"
    plain = evaluate(policy, asked[:3], None, Reader(None), seed=5, samples_per_prompt=2)
    assert plain.made_by["sampling"]["top_k"] == 0
    assert not torch.equal(plain.images, found.images)


def test_the_policy_works_inside_the_precision_and_in_eval_mode(policy: Inkling, asked: list[Prompt]) -> None:
    inside, seen = list[bool](), list[tuple[bool, bool, bool]]()
    decode = policy.decode

    @contextmanager
    def precision() -> Any:
        inside.append(True)
        yield
        inside.pop()

    def decoded(actions: Tensor, schedule: Any) -> Tensor:
        seen.append((bool(inside), policy.training, torch.is_grad_enabled()))
        return decode(actions, schedule).double()

    policy.train()
    policy.decode = decoded  # type: ignore[method-assign]
    try:
        found = evaluate(policy, asked[:2], None, Reader(None), seed=0, precision=precision())
        assert policy.training
    finally:
        policy.eval()
        del policy.decode  # type: ignore[method-assign]
    assert seen == [(True, False, False)]
    assert found.images.dtype == torch.float32
    assert found.rewards.dtype == np.float32


def test_a_policy_is_left_in_its_mode_if_a_reward_raises(policy: Inkling, asked: list[Prompt]) -> None:
    def broken(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        raise ZeroDivisionError

    policy.train()
    try:
        with pytest.raises(ZeroDivisionError):
            evaluate(policy, asked[:1], None, broken, seed=0)  # type: ignore[arg-type]
        assert all(module.training for module in policy.modules())
    finally:
        policy.eval()


def test_words_are_counted_picture_by_picture(policy: Inkling, asked: list[Prompt]) -> None:
    """Three words, one, two and none; the second sample of the second prompt fails."""
    texts = ["keba lux map", "lux", "run", None, "zen zen", "set zen", "no", ""]
    found = evaluate(policy, asked, None, Reader(texts), seed=0, samples_per_prompt=2)
    np.testing.assert_equal(found.hits, [3, 1, 1, np.nan, 1, 2, 0, 0])
    assert found.failed == 1
    assert found.texts == ["keba lux map", "lux", "run", "", "zen zen", "set zen", "no", ""]
    assert found.metrics == ["word_accuracy", "ned", "reward"]
    above, below = found.totals("word_accuracy")
    assert (above.tolist(), below.tolist()) == ([4, 1, 3, 0], [6, 1, 4, 0])
    above, below = found.totals("reward")
    assert (above.tolist(), below.tolist()) == ([1, 2, 9, 13], [2, 1, 2, 2])
    assert found.word_accuracy is not None
    assert found.word_accuracy.value == pytest.approx(8 / 11)
    assert found.reward.value == pytest.approx(25 / 7)
    assert found.neds is not None
    assert found.neds[[0, 2, 5]].tolist() == pytest.approx([3, 1, 2])
    assert np.isnan(found.neds).tolist() == [False] * 3 + [True] + [False] * 4

    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (record["prompts"], record["pictures"], record["failed"]) == (4, 8, 1)
    assert record["made_by"] == json.loads(json.dumps(found.made_by))
    assert list(record["metrics"]) == ["word_accuracy", "ned", "reward"]
    assert record["metrics"]["reward"]["value"] == pytest.approx(25 / 7)
    second = record["per_prompt"][1]
    assert second["text"] == asked[1].text
    assert (second["words"], second["label"], second["wanted"]) == (["RUN"], None, 1)
    assert (second["reward"], second["hits"], second["read"]) == ([2.0, None], [1.0, None], ["run", ""])
    assert second["ned_sum"] == [pytest.approx(1.0), None]
    assert record["per_prompt"][2]["reward"] == [4.0, 5.0]


def test_a_record_without_words(policy: Inkling, asked: list[Prompt]) -> None:
    found = evaluate(policy, asked[:2], None, Reader(None), seed=0)
    assert (found.metrics, found.hits, found.neds, found.texts) == (["reward"], None, None, None)
    assert found.to_dict()["per_prompt"][1] == {
        "text": asked[1].text, "words": ["RUN"], "label": asked[1].label, "reward": [1.0],
    }  # fmt: skip
    # Words that only a failed picture was to hold are none.
    failed = evaluate(policy, [asked[1], asked[3]], None, Reader([None, "a"]), seed=0)
    assert failed.hits is None
    assert failed.reward.value == 1.0


def test_what_cannot_be_evaluated(policy: Inkling, asked: list[Prompt]) -> None:
    for options in ({"batch": 0}, {"samples_per_prompt": 0}):
        with pytest.raises(ValueError, match="batch and samples_per_prompt must be at least 1"):
            evaluate(policy, asked, None, Reader(None), seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"none of the 2 pictures could be scored$"):
        evaluate(policy, asked[:2], None, Reader([None, None]), seed=0)

    class Told(Reader):
        failures = type("Failures", (), {"reasons": {"no paper": 1, "no ink": 1}})

    with pytest.raises(RunError, match="none of the 2 pictures could be scored: no paper; no ink"):
        evaluate(policy, asked[:2], None, Told([None, None]), seed=0)


def made(rewards: list[float], hits: list[float], neds: list[float], samples: int = 1) -> Evaluation:
    """Of prompts of two words each."""
    count = len(rewards) // samples
    prompts = [Prompt(f"p{i}", ("a", "b")) for i in range(count)]
    given = (np.array(values, np.float64) for values in (rewards, hits, neds))
    return Evaluation(prompts, samples, torch.zeros(len(rewards), 3, 4, 4), [""] * len(rewards), *given)


def test_intervals_are_the_percentiles_of_a_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(7)
    hits, before = rng.integers(0, 3, 50).astype(float), rng.integers(0, 3, 50).astype(float)
    found = made([1.0] * 50, hits.tolist(), hits.tolist())
    e = found.word_accuracy
    assert e is not None
    draws = np.random.default_rng(0).multinomial(50, np.full(50, 1 / 50), size=2000)
    share = draws @ hits / 100
    assert (e.value, e.low, e.high) == pytest.approx((hits.sum() / 100, *np.percentile(share, (2.5, 97.5))))
    change = paired_difference(made([1.0] * 50, before.tolist(), hits.tolist()), found)
    difference = share - draws @ before / 100
    assert (change.low, change.high) == pytest.approx(tuple(np.percentile(difference, (2.5, 97.5))))
    assert change.value == pytest.approx((hits.sum() - before.sum()) / 100)
    assert {type(e.value), type(e.low), type(e.high)} == {float}  # what any format can keep
    assert str(e) == f"{e.value:.4f} ({e.low:.4f} to {e.high:.4f})"


def test_tables_hold_each_metric_on_its_own_row() -> None:
    before = made([1.0, 3.0], [0.0, 1.0], [1.0, 0.6])
    after = made([2.0, 6.0], [1.0, 2.0], [1.2, 1.0])
    rows = {
        line.split("│")[1].strip(): line for line in shown(comparison_table(before, after)).splitlines() if "│" in line
    }
    for name, old, new, rise in (
        ("word accuracy", "0.2500", "0.7500", "+0.5000"),
        ("NED", "0.4000", "0.5500", "+0.1500"),
        ("reward", "2.0000", "4.0000", "+2.0000"),
    ):
        cells = [cell.strip() for cell in rows[name].split("│")[2:5]]
        assert [cell.split()[0] for cell in cells] == [old, new, rise]
    assert "+2.0000 (+1.0000 to +3.0000)" in rows["reward"]
    assert "2 prompts" in shown(comparison_table(before, after))
    assert "FAILED" not in shown(comparison_table(before, after))
    failed = made([2.0, np.nan], [1.0, np.nan], [1.0, np.nan])
    assert "FAILED and left out: 0 before, 1 after" in shown(comparison_table(before, failed))
    # Only what both have is compared.
    unread = Evaluation(before.prompts, 1, before.images, None, before.rewards, None, None)
    for pair in ((before, unread), (unread, before)):
        assert "NED" not in shown(comparison_table(*pair))

    own = {line.split("│")[1].strip(): line for line in shown(before.table()).splitlines() if "│" in line}
    assert [own["NED"].split("│")[2].strip(), own["reward"].split("│")[3].strip()] == ["0.4000", "1.0000 to 3.0000"]
    assert "2 prompts, 2 pictures" in shown(before.table())
    assert "FAILED" not in shown(before.table())


@pytest.mark.parametrize("change", [{"text": "other"}, {"words": ("a",)}, {"label": 3}])
def test_pairs_are_of_the_same_prompts(change: dict[str, Any]) -> None:
    before, after = made([1.0, 2.0], [1, 1], [1, 1]), made([1.0, 2.0], [1, 1], [1, 1])
    assert paired_difference(before, after, "reward").value == 0
    after.prompts[1] = replace(after.prompts[1], **change)
    with pytest.raises(ValueError, match="on the same prompts in the same order only; these have 2 and 2 prompts"):
        paired_difference(before, after, "reward")


def test_pairs_are_of_prompts_scored_on_both_sides() -> None:
    nan = np.nan
    before = made([nan, 2.0, 4.0, 5.0], [nan, 1, 1, 1], [nan, 1, 1, 1])
    after = made([9.0, 3.0, nan, 9.0], [2, 1, nan, 0], [2, 1, nan, 0])
    assert paired_difference(before, after, "reward").value == pytest.approx(6.0 - 3.5)
    assert paired_difference(before, after).value == pytest.approx(1 / 4 - 2 / 4)
    with pytest.raises(ValueError, match="no metric 'reads' in this evaluation; there are word_accuracy, ned, reward"):
        paired_difference(before, after, "reads")


class Half(Distributed):
    """The second of two processes, whose first one drew nothing that is asked for here."""

    def portion(self, items: int) -> range:
        return range(items // 2, items)


def test_progress_is_of_this_process(policy: Inkling) -> None:
    told: list[tuple[int, int]] = []
    prompts = make_prompts(6)
    evaluate(
        policy,
        prompts,
        None,
        Reader(None),
        seed=0,
        batch=2,
        progress=lambda done, total: told.append((done, total)),
        distributed=Half(),
    )
    assert told == [(2, 3), (3, 3)]


def test_defaults_of_evaluation() -> None:
    assert defaults(held_out) == {
        "evaluate": {
            "batch": 32,
            "progress": None,
            "samples_per_prompt": 1,
            "schedule": None,
            "precision": None,
            "distributed": None,
        },
        "paired_difference": {"metric": "word_accuracy"},
    }
