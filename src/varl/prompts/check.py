"""Prompts held against the policy that is to draw them, before any work starts."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence

from varl.policy import Policy, Prompt
from varl.prompts.files import check_size
from varl.schedule import ScaleSchedule

__all__ = ["check_prompts"]

CHECKED_AT_ONCE = 32
Counted = Callable[[str], tuple[int, int] | None]


def check_prompts(policy: Policy, prompts: Sequence[Prompt], schedule: ScaleSchedule) -> None:
    """Condition on every prompt, a few at a time, so that one that cannot be drawn is found before work starts.

    Warns of prompts whose text the policy's encoder cuts, because it reads so many tokens and no more: prompts that are
    alike up to there have one condition.

    Raises:
        ValueError: if a prompt is longer than any encoder reads, the policy takes no condition from it, or a wanted
            word stands only in what is cut: no picture could win its reward.
    """
    for number, prompt in enumerate(prompts, 1):
        check_size(prompt, f"prompt {number}")
    for first in range(0, len(prompts), CHECKED_AT_ONCE):
        policy.condition(prompts[first : first + CHECKED_AT_ONCE], schedule)
    counted = getattr(policy, "text_tokens", None)
    if counted is None:
        return
    cut = [note for number, prompt in enumerate(prompts, 1) if (note := _cut(counted, number, prompt))]
    if cut:
        more = f", and {len(cut) - 1} more" if len(cut) > 1 else ""
        warnings.warn(f"the end of {cut[0]}{more} has no effect; shorten the text", stacklevel=2)


def _cut(counted: Counted, number: int, prompt: Prompt) -> str:
    """What is said of a prompt that is cut; empty if it is not."""
    found = counted(prompt.text)
    if found is None or found[0] <= found[1]:
        return ""
    tokens, limit = found
    kept = _kept(counted, prompt.text, limit)
    about = f"prompt {number}, {reprlib.repr(prompt.text)}, of whose {tokens} tokens the text encoder reads {limit},"
    for word in dict.fromkeys(prompt.words):
        wanted = min(prompt.words.count(word), prompt.text.count(word))
        if kept.count(word) < wanted:
            raise ValueError(
                f"in {about} the wanted text {reprlib.repr(word)} stands in what is cut; shorten the prompt"
            )
    return about.rstrip(",")


def _kept(counted: Counted, text: str, limit: int) -> str:
    """The longest beginning of a text that is read whole."""
    least, most = 0, len(text)
    while least < most:
        middle = (least + most + 1) // 2
        found = counted(text[:middle])
        least, most = (middle, most) if found is not None and found[0] <= limit else (least, middle - 1)
    return text[:least]
