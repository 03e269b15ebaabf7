"""Prompts that a text encoder cuts: named before work starts."""

from __future__ import annotations

from pathlib import Path

import pytest

import varl
from models.infinity.cases import SMALL
from models.infinity.test_text import flan_t5  # noqa: F401
from models.switti.test_checkpoint import CONFIG as SWITTI
from models.switti.test_condition import parts  # noqa: F401
from models.tokenflow.test_condition import Letters, letters  # noqa: F401
from models.tokenflow.test_policy import TOKENIZER, TRANSFORMER
from varl.models.tokenflow import TokenFlow
from varl.models.tokenflow.config import read_config
from varl.policy import Policy, Prompt
from varl.prompts import check_prompts
from varl.schedule import ScaleSchedule


class Counting:
    """A policy whose text encoder reads six letters."""

    def condition(self, prompts, schedule):
        return None

    def text_tokens(self, text):
        return len(text), 6


def test_prompts_that_are_cut(recwarn):
    schedule = ScaleSchedule.square((1, 2))
    check_prompts(Counting(), [Prompt("abcdef", ("ef",)), Prompt("abc", ("not there",))], schedule)
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"prompt 2, 'abcdefgh', of whose 8 tokens the text encoder reads 6, and 1 more"
    ):
        check_prompts(Counting(), [Prompt("abc"), Prompt("abcdefgh", ("ab",)), Prompt("abcdefxx")], schedule)
    # Wanted more often than the text has it, or less often: what is kept has what can be had.
    for prompt in (Prompt("ab cdefgh", ("ab", "ab")), Prompt("ab cdefab", ("ab",)), Prompt("abcdefgh", ("x",))):
        with pytest.warns(UserWarning, match="prompt 1, .* of whose . tokens the text encoder reads 6 has no effect"):
            check_prompts(Counting(), [prompt], schedule)
    for prompt in (Prompt("abcdefgh", ("ab", "gh")), Prompt("abcdefg", ("fg",)), Prompt("ab ab ab", ("ab",) * 3)):
        with pytest.raises(ValueError, match=r"in prompt 1, .* the wanted text '(gh|fg|ab)' stands in what is cut"):
            check_prompts(Counting(), [prompt], schedule)
    with pytest.raises(ValueError, match="prompt 1: a prompt has at most 20,000 characters"):
        check_prompts(Counting(), [Prompt("a" * 30_000)], schedule)


def cut(policy: Policy, whole: str, longer: str, tokens: int, limit: int) -> None:
    """``whole`` just fits; of ``longer`` the last word is cut."""
    assert policy.text_tokens(whole) == (limit, limit)
    assert policy.text_tokens(longer) == (tokens, limit)
    last = longer.split()[-1]
    check_prompts(policy, [Prompt(whole, (whole.split()[-1],))], policy.default_schedule)
    with pytest.warns(UserWarning, match=f"of whose {tokens} tokens the text encoder reads {limit}"):
        check_prompts(policy, [Prompt(longer)], policy.default_schedule)
    with pytest.raises(ValueError, match=f"the wanted text '{last}' stands in what is cut"):
        check_prompts(policy, [Prompt(longer, (last,))], policy.default_schedule)
    # What makes it matter: both are one condition.
    one, other = (policy.condition([Prompt(text)]).features for text in (longer, longer + " more"))
    assert all(one[name].equal(other[name]) for name in one)


def test_infinity_counts_what_t5_cuts(flan_t5: Path) -> None:  # noqa: F811
    config = {**SMALL["transformer"], **SMALL["tokenizer"], "scale_schedule": SMALL["scale_schedule"]}
    weights = {"transformer": "random", "tokenizer": "random", "text_encoder": flan_t5}
    policy = varl.load_policy("infinity", config, weights)
    cut(policy, "a " * 10 + "cat", "a " * 11 + "cat mat", 14, 12)


def test_switti_counts_what_clip_cuts(parts: dict) -> None:  # noqa: F811
    policy = varl.load_policy("switti", SWITTI, parts)
    cut(policy, "a " * 74 + "b", "a " * 75 + "b c", 79, 77)


def test_tokenflow_counts_what_it_cuts(letters: Letters, tmp_path: Path) -> None:  # noqa: F811
    policy = TokenFlow(read_config({"transformer": TRANSFORMER, "tokenizer": TOKENIZER}), text=tmp_path)
    cut(policy, "a bc", "a b cd", 7, 5)
