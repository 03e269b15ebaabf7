"""Outputs of rewards, field by field: types, orders, boundaries, and the reasons for which pictures fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from varl.policy import Prompt
from varl.rewards import RewardOutput, checks
from varl.rewards.base import FailureLog
from varl.rewards.checks import checked
from varl.rewards.scoring import Scoring

SQUARE = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], np.float32)


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_scores_become_float32_without_a_gradient() -> None:
    for scores in ([1, 2], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)):
        output = RewardOutput.from_scores(scores, 2)  # type: ignore[arg-type]
        assert (output.score.dtype, output.score.requires_grad) == (torch.float32, False)
        assert output.score.tolist() == [1, 2]
        assert output.failed.dtype == torch.bool
    output = RewardOutput.from_scores([1.0, float("inf")], 2)
    assert (output.score.isnan().tolist(), output.failed.tolist()) == ([False, True], [False, True])
    with pytest.raises(ValueError, match=r"^a reward must return 3 numbers for 3 pictures, got shape \(2,\)$"):
        RewardOutput.from_scores([1, 2], 3)
    for complex_ones in (torch.ones(2) * 1j, np.ones(2) * 1j):
        with pytest.raises(ValueError, match=r"^a reward must return real numbers, got complex ones$"):
            RewardOutput.from_scores(complex_ones, 2)  # type: ignore[arg-type]


def test_failures_follow_from_scores_that_are_no_tensor() -> None:
    output = RewardOutput([1.0, float("nan"), float("inf")])  # type: ignore[arg-type]
    assert output.failed.tolist() == [False, True, True]


def test_failed_like_nothing() -> None:
    output = RewardOutput.failed_like(2)
    assert (output.score.shape, output.failed.dtype, output.failed.tolist()) == ((2,), torch.bool, [True, True])
    assert (output.regions, output.parts, output.texts) == (None, {}, None)
    like = RewardOutput(torch.ones(1), regions=[[SQUARE]], parts={"a": torch.ones(1)}, texts=["x"])
    output = RewardOutput.failed_like(2, like)
    assert (output.regions, output.texts, list(output.parts)) == ([[], []], ["", ""], ["a"])
    assert output.score.isnan().tolist() == output.failed.tolist() == output.parts["a"].isnan().tolist() == [True] * 2


def test_holding_keeps_what_is_there_and_fills_what_is_not() -> None:
    own = RewardOutput(torch.ones(2), regions=[[SQUARE], []], parts={"b": torch.ones(2)}, texts=["x", "y"])
    others = (
        RewardOutput(torch.ones(1), parts={"c": torch.zeros(1), "b": torch.zeros(1)}, regions=[[]], texts=["z"]),
        RewardOutput(torch.ones(1), parts={"a": torch.zeros(1), "c": torch.zeros(1)}),
    )
    held = own.holding(*others)
    assert (held.regions, held.texts) == (own.regions, ["x", "y"])
    assert list(held.parts) == ["b", "c", "a"]  # each once, in the order met
    assert held.parts["b"].tolist() == [1, 1]
    assert all(held.parts[name].shape == (2,) and held.parts[name].isnan().all() for name in ("a", "c"))
    bare = RewardOutput(torch.ones(2)).holding(*others)
    assert (bare.regions, bare.texts, list(bare.parts)) == ([[], []], ["", ""], ["c", "b", "a"])
    assert bare.regions is not None
    assert bare.regions[0] is not bare.regions[1]
    alone = own.holding()
    assert (alone.regions, alone.texts, list(alone.parts)) == (own.regions, own.texts, ["b"])
    nothing = RewardOutput(torch.ones(2)).holding(RewardOutput(torch.ones(2)))
    assert (nothing.regions, nothing.texts, nothing.parts) == (None, None, {})


def test_joined_in_order() -> None:
    first = RewardOutput(torch.tensor([1.0]), regions=[[SQUARE]], parts={"a": torch.tensor([2.0])}, texts=["x"])
    second = RewardOutput(
        torch.tensor([3.0, 4.0]), torch.tensor([True, False]), parts={"a": torch.zeros(2)}, texts=["y", "z"]
    )
    output = RewardOutput.joined([first, second])
    assert output.score.tolist() == [1, 3, 4]
    assert output.failed.tolist() == [False, True, False]
    assert output.regions == [[SQUARE], [], []]
    assert output.parts["a"].tolist() == [2, 0, 0]
    assert output.texts == ["x", "y", "z"]
    alone = RewardOutput.joined([first])
    assert (alone.score.tolist(), alone.regions, list(alone.parts), alone.texts) == ([1], [[SQUARE]], ["a"], ["x"])
    with pytest.raises(ValueError, match=r"^there is no output to join$"):
        RewardOutput.joined([])


def reasons(**fields: Any) -> tuple[RewardOutput, dict[str, int]]:
    """Of three pictures."""
    log = FailureLog("test")
    output = checked(RewardOutput(fields.pop("score", torch.ones(3)), **fields), 3, log)
    assert log.total == sum(log.reasons.values())
    return output, log.reasons


MARKED = "no finite score, or marked as failed by the reward"
NO_TEXT = "TypeError: texts hold texts, not "
NO_POLYGON = "ValueError: regions hold polygons [points, 2] of finite numbers, not "
DEEP = np.zeros((4, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"score": torch.tensor([1.0, torch.nan, torch.inf])}, {MARKED: 2}),
        ({"score": torch.tensor([1.0, torch.nan, torch.inf]), "failed": [1, 0, 0]}, {MARKED: 3}),
        ({"failed": [0, 1, 1]}, {MARKED: 2}),
        ({"texts": ["a", 3, None]}, {f"{NO_TEXT}3": 1, f"{NO_TEXT}None": 1}),
        ({"texts": [3, 3, "a"]}, {f"{NO_TEXT}3": 2}),
        (
            {"texts": ["a", "b" * 5001, ""]},
            {"ValueError: the text of a picture may have 5,000 characters, this one has 5,001": 1},
        ),
        (
            {"regions": [[], [np.zeros((5001, 2))], []]},
            {
                "ValueError: the regions of a picture may have 5,000 points together, these have 5,001 or more; "
                "give simpler outlines": 1
            },
        ),
        *(
            (
                {"regions": [[], empty, []]},
                {
                    "ValueError: the regions of a picture may have 5,000 points together, these have 5,001 or more; "
                    "give simpler outlines": 1
                },
            )
            for empty in ([np.zeros((0, 2))] * 5001, repeat(np.zeros((0, 2))))
        ),
        ({"regions": [[], [SQUARE, DEEP], []]}, {f"{NO_POLYGON}{DEEP.tolist()!r:.100}": 1}),
        ({"regions": [[], [[1.0, 2.0]], []]}, {f"{NO_POLYGON}[1.0, 2.0]": 1}),
        ({"regions": [[], [[[1.0, 2.0, 3.0]]], []]}, {f"{NO_POLYGON}[[1.0, 2.0, 3.0]]": 1}),
        ({"regions": [[], [[[1.0, float("inf")]]], []]}, {f"{NO_POLYGON}[[1.0, inf]]": 1}),
        # A number has no points: here there are as many as there may be before it.
        ({"regions": [[], [np.zeros((5000, 2)), 3.0], []]}, {f"{NO_POLYGON}3.0": 1}),
        # The first reason counts.
        ({"failed": [0, 1, 0], "texts": ["a", 3, "c"], "regions": [[], 3, []]}, {MARKED: 1}),
        ({"texts": ["a", 3, "c"], "regions": [[], 3, []]}, {"TypeError: 'int' object is not iterable": 1}),
    ],
)  # fmt: skip
def test_reasons(fields: dict[str, Any], expected: dict[str, int]) -> None:
    output, found = reasons(**fields)
    assert found == expected
    assert int(output.failed.sum()) == sum(expected.values())
    assert output.score.isnan().tolist() == output.failed.tolist()
    if output.texts is not None:
        good = [isinstance(text, str) and len(text) <= 5000 for text in fields["texts"]]
        assert output.texts == [text if fine else "" for text, fine in zip(fields["texts"], good, strict=True)]
    if output.regions is not None:
        assert output.regions == [[], [], []]


def test_the_most_of_each() -> None:
    assert (checks.MOST_POINTS, checks.MOST_CHARACTERS) == (5000, 5000)
    output, found = reasons(regions=[[SQUARE] * 1250, [], []], texts=["b" * 5000, "", "c"], failed=[0, 0, 0])
    assert found == {}
    assert output.failed.tolist() == [False, False, False]


def test_fields_are_copies_of_one_type() -> None:
    polygon, own = torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True), SQUARE.copy()
    score = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    output, found = reasons(
        score=score,
        failed=torch.zeros(3),
        parts={"score_": [1, 2, 3], "_": score},
        regions=[[polygon], [[[1, 2], [3, 4]]], [own]],
    )
    own += 1
    assert found == {}
    assert (output.score.requires_grad, output.failed.dtype) == (False, torch.bool)
    assert list(output.parts) == ["score_", "_"]
    assert [(part.dtype, part.requires_grad) for part in output.parts.values()] == [(torch.float32, False)] * 2
    assert output.parts["score_"].tolist() == [1, 2, 3]
    assert output.regions is not None
    assert [[array.dtype for array in arrays] for arrays in output.regions] == [[np.float32]] * 3
    assert [arrays[0].tolist() for arrays in output.regions] == [[[0, 1], [2, 3]], [[1, 2], [3, 4]], SQUARE.tolist()]


def test_no_pictures_are_fine() -> None:
    output = checked(RewardOutput(torch.zeros(0), regions=[], texts=[]), 0)
    assert (output.score.shape, output.failed.dtype, output.regions, output.texts) == ((0,), torch.bool, [], [])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"score": torch.ones(2)}, r"score must hold 3 numbers for 3 pictures, has shape \(2,\)"),
        ({"failed": [True]}, r"failed must hold 3 numbers for 3 pictures, has shape \(1,\)"),
        ({"parts": {"a": torch.ones(3, 1)}}, r"parts\['a'\] must hold 3 numbers for 3 pictures, has shape \(3, 1\)"),
        ({"score": torch.ones(3) * 1j}, "score must hold real numbers, has complex ones"),
        ({"parts": {"a": torch.ones(3) * 1j}}, r"parts\['a'\] must hold real numbers, has complex ones"),
        ({"regions": [[]]}, "regions must hold 3 entries for 3 pictures, has 1"),
        ({"texts": ["a"] * 4}, "texts must hold 3 entries for 3 pictures, has 4"),
        ({"parts": {"score": torch.ones(3)}}, "a part needs a name other than 'score', got 'score'"),
        ({"parts": {"": torch.ones(3)}}, "a part needs a name other than 'score', got ''"),
        ({"parts": {3: torch.ones(3)}}, "a part needs a name other than 'score', got 3"),
    ],
)
def test_what_is_no_output(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        reasons(**fields)


@pytest.mark.parametrize("overlap", [False, True])
def test_pictures_meet_their_prompts(overlap: bool) -> None:
    """In parts of one, two and three pictures."""
    calls: list[tuple[list[float], list[str]]] = []

    def reward(images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        calls.append((images.flatten().tolist(), [prompt.text for prompt in prompts]))
        return RewardOutput(images.flatten() * 2)

    numbers, names = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], list("abcdef")
    pictures = torch.tensor(numbers)[:, None, None, None]
    with ThreadPoolExecutor(1) as pool:
        scoring = Scoring(reward, [Prompt(name) for name in names], pool if overlap else None)  # type: ignore[arg-type]
        for part in pictures.split([1, 2, 3]):
            scoring.add(part)
        images, output = scoring.result()
    assert torch.equal(images, pictures)
    assert output.score.tolist() == [2 * number for number in numbers]
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)] if overlap else [slice(0, 6)]
    assert calls == [(numbers[part], names[part]) for part in parts]
