"""Held-out evaluation: averages against closed forms, intervals, failures, and independence of the batch size."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import varl
from varl.evaluation.held_out import Estimate, Evaluation, comparison_table, evaluate, paired_difference
from varl.policy import Prompt
from varl.prompts import inkling_prompts
from varl.rewards.base import RewardOutput

TINY = {"codes": 16, "coarse": 4, "fine": 4, "decoder": 8, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return varl.load_policy("inkling", TINY, "random")


class Reader:
    """Reads whatever it is told to, picture by picture; None stands for a picture that fails."""

    def __init__(self, texts, scores=None):
        self.texts, self.scores, self.seen = list(texts), scores, 0

    def __call__(self, images, prompts):
        own = slice(self.seen, self.seen + len(prompts))
        self.seen += len(prompts)
        texts = self.texts[own]
        failed = torch.tensor([text is None for text in texts])
        score = torch.tensor(self.scores[own]) if self.scores else torch.ones(len(texts))
        # A failed picture's score must not count, whatever it is.
        return RewardOutput(score.float(), failed, texts=[text or "" for text in texts])

    def describe(self):
        return {"reward": "reader", "version": "[bold]1"}


class Brightness:
    def __call__(self, images, prompts):
        return RewardOutput.from_scores(images.mean((1, 2, 3)), len(images))

    def describe(self):
        return {"reward": "brightness"}


def make(hits, wanted, rewards=None, neds=None, samples=1):
    prompts = [Prompt(f"p{i}", ("w",) * n) for i, n in enumerate(wanted)]
    hits = np.array(hits, float)
    return Evaluation(
        prompts, samples, torch.zeros(len(hits), 3, 4, 4), [""] * len(hits),
        np.where(np.isnan(hits), np.nan, 1.0) if rewards is None else np.array(rewards, float),
        hits, hits / 2 if neds is None else np.array(neds, float),
    )  # fmt: skip


def test_a_picture_does_not_depend_on_the_batch(policy):
    prompts = inkling_prompts(5)
    sampling = varl.Sampling(guidance=1.0, top_k=8)
    calls = []
    small = evaluate(
        policy, prompts, sampling, Brightness(), seed=3, batch=2, samples_per_prompt=2,
        progress=lambda *at: calls.append(at),
    )  # fmt: skip
    large = evaluate(policy, prompts, sampling, Brightness(), seed=3, batch=32, samples_per_prompt=2)
    first = evaluate(policy, prompts[:2], sampling, Brightness(), seed=3)
    assert calls == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 10)]
    torch.testing.assert_close(small.images, large.images)
    torch.testing.assert_close(small.images[[0, 2]], first.images)  # the first sample of each
    assert len({image.numpy().tobytes() for image in small.images}) == 10
    other = evaluate(policy, prompts[:2], sampling, Brightness(), seed=4)
    assert not torch.equal(other.images, first.images)


def test_modes_are_left_alone(policy):
    policy.trainable.train()
    parts = [module.training for module in policy.modules()]
    evaluate(policy, inkling_prompts(1), None, Brightness(), seed=0)
    assert [module.training for module in policy.modules()] == parts
    policy.eval()


def test_averages_are_over_words_and_failures_are_left_out(policy):
    words = [("KEBA", "LUX", "KEBAB"), ("RUN",), ("SET", "MAP"), ("ZEN",)]
    prompts = [replace(p, words=w) for p, w in zip(inkling_prompts(4), words, strict=True)]
    read = ["keba lux", "bun", None, "ZEN zen"]
    result = evaluate(policy, prompts, None, Reader(read, [1.0, 0.0, 100.0, 0.5]), seed=0, batch=3)
    assert result.failed == 1
    assert result.word_accuracy.value == pytest.approx(3 / 5)  # not the mean of 2/3, 0, 1
    similar = 1 - 1 / (3 + 1e-5)  # bun for run
    kebab = 1 - 1 / (5 + 1e-5)  # keba for kebab
    assert result.ned.value == pytest.approx((1 + 1 + kebab + similar + 1) / 5)
    assert result.reward.value == pytest.approx(0.5)
    assert np.isnan(result.rewards).tolist() == [False, False, True, False]
    assert result.texts == ["keba lux", "bun", "", "ZEN zen"]

    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["failed"] == 1
    assert record["metrics"]["word_accuracy"]["value"] == pytest.approx(0.6)
    assert {type(value) for value in result.made_by.values()} <= {str, int, dict}  # what any format can keep
    assert record["made_by"]["varl"] == varl.__version__
    assert record["made_by"]["reward"]["reward"] == "reader"
    assert record["made_by"]["sampling"]["guidance"] == 0
    assert record["made_by"]["seed"] == 0
    assert [row["hits"] for row in record["per_prompt"]] == [[2.0], [0.0], [None], [1.0]]

    console = Console(record=True, width=100)
    console.print(result.table())
    shown = console.export_text()
    assert "0.6000" in shown
    assert "1 FAILED and left out" in shown
    assert "[bold]1" in shown


def test_a_reward_that_does_not_read_gives_only_the_reward(policy):
    result = evaluate(policy, inkling_prompts(3), None, Brightness(), seed=0)
    assert (result.word_accuracy, result.ned, result.texts) == (None, None, None)
    assert result.reward.value == pytest.approx(float(result.images.mean()), rel=1e-5)
    assert list(result.to_dict()["metrics"]) == ["reward"]
    with pytest.raises(ValueError, match="no metric 'ned' in this evaluation; there are reward"):
        result.estimate("ned")
    wordless = [replace(p, words=()) for p in inkling_prompts(2)]
    assert evaluate(policy, wordless, None, Reader(["a", "b"]), seed=0).word_accuracy is None


def test_errors(policy):
    with pytest.raises(RuntimeError, match="none of the 2 pictures could be scored"):
        evaluate(policy, inkling_prompts(2), None, Reader([None, None]), seed=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(policy, [], None, Brightness(), seed=0)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        evaluate(policy, inkling_prompts(2), None, Brightness(), seed=0, batch=0)


def test_interval_is_the_mean_plus_minus_two_standard_errors():
    # With one word a prompt the ratio is a plain mean, whose interval is known.
    rng = np.random.default_rng(1)
    hits = (rng.random(900) < 0.3).astype(float)
    e = make(hits, [1] * 900).word_accuracy
    error = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 900)
    assert e.value == pytest.approx(hits.mean())
    assert e.high - e.value == pytest.approx(error, rel=0.1)
    assert e.value - e.low == pytest.approx(error, rel=0.1)


def test_interval_counts_prompts_not_pictures_or_words():
    # Nine equal samples of a prompt, or nine words of one fate, tell no more than one.
    hits = np.tile([1.0, 0.0, 0.0], 30)
    one = make(hits, [1] * 90).word_accuracy
    assert make(np.repeat(hits, 9), [1] * 90, samples=9).word_accuracy == one
    assert make(hits * 9, [9] * 90).word_accuracy == one
    # The words of a prompt that always come out alike leave no doubt.
    assert make([1.0] * 8, [2] * 8).word_accuracy == Estimate(0.5, 0.5, 0.5)


def test_interval_of_a_ratio():
    # All prompts have rate 1/2, whatever their length: resampling cannot move the ratio.
    assert make([1.0, 2.0, 3.0, 1.0], [2, 4, 6, 2]).word_accuracy == Estimate(0.5, 0.5, 0.5)


def test_failures_take_their_words_along():
    e = make([1.0, np.nan, np.nan, 2.0], [2, 2], samples=2)
    assert e.word_accuracy.value == 3 / 4
    assert e.failed == 2
    assert make([1.0, np.nan], [2, 50]).word_accuracy.value == 0.5


def test_paired_difference():
    rng = np.random.default_rng(2)
    wanted = rng.integers(2, 30, 60)
    before = make(rng.binomial(wanted, 0.3), wanted)
    assert paired_difference(before, before) == Estimate(0, 0, 0)
    # One word more of every prompt of 10: pairs agree exactly, though prompts differ widely.
    ten = rng.integers(0, 10, 60)
    rise = paired_difference(make(ten, [10] * 60), make(ten + 1, [10] * 60))
    assert (rise.value, rise.low, rise.high) == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference(make(ten + 1, [10] * 60), make(ten, [10] * 60)).value == pytest.approx(-0.1)
    assert paired_difference(make(ten, [10] * 60), make(ten + 1, [10] * 60), "ned").value == pytest.approx(0.05)
    # Only the prompts scored on both sides count.
    d = paired_difference(make([1, np.nan, 0], [1, 1, 2]), make([1, 1, 2], [1, 1, 2]))
    assert d.value == pytest.approx(3 / 3 - 1 / 3)


def test_paired_difference_refuses():
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(make([1], [1]), make([1], [2]))
    with pytest.raises(ValueError, match="no prompt has a word accuracy in both"):
        paired_difference(make([1, np.nan], [1, 1]), make([np.nan, 1], [1, 1]))


def test_comparison_table():
    console = Console(record=True, width=140)
    console.print(comparison_table(make([1, 0, np.nan], [2, 2, 2]), make([2, 2, 2], [2, 2, 2])))
    shown = console.export_text()
    assert "0.2500" in shown
    assert "1.0000 (1.0000 to 1.0000)" in shown
    assert "+0.7500 (+0.5000 to +1.0000)" in shown
    assert "FAILED and left out: 1 before, 0 after" in shown
