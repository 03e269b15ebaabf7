"""Teacher forcing, as all families do it: one pass over given actions, whole or after a prefix that was read before."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from varl.models.blocks import Cache, PrefixKeys
from varl.models.state import DrawState
from varl.policy import Condition
from varl.schedule import ScaleSchedule

__all__ = ["TeacherForced"]


class TeacherForced(nn.Module):
    """``hidden`` and ``prefill`` of ``varl.policy.Policy``, from what a family computes in ``features`` and ``drawn``.

    Attributes:
        shares_keys: whether a step attends to the steps before it. If not, a step costs the same with and without a
            prefix, and states hold no cache.
    """

    shares_keys = True

    @abstractmethod
    def features(self, condition: Condition, actions: Tensor, steps: range, cache: Cache | None) -> Tensor:
        """What the head needs for the tokens of ``steps``, [batch, tokens, width].

        ``actions`` cover all steps before the last of ``steps``, at least. The cache holds all steps before the first,
        and takes in the others; without one, ``steps`` start at 0, unless scales share no keys.
        """

    @abstractmethod
    def drawn(self, actions: Tensor, schedule: ScaleSchedule, steps: int) -> dict[str, Tensor]:
        """What a state keeps of the first ``steps`` steps, in ``DrawState.drawn``."""

    @abstractmethod
    def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
        """An empty sequence."""

    def hidden(self, condition: Condition, actions: Tensor, steps: range, prefix: DrawState | None = None) -> Tensor:
        """Teacher-forced features of the tokens of ``steps``: [batch, tokens, width].

        Args:
            actions: [batch, tokens, *event], at least all steps before the last of ``steps``.
            prefix: a state at ``steps.start`` whose keys and values stand for the coarser steps, with gradient if
                ``prefill`` made it so. Each of its rows serves as many adjacent rows of the batch. Without it the
                coarser steps are computed, with gradient.

        Raises:
            ValueError: if the actions do not cover what the steps read, or the prefix does not fit.
        """
        schedule = condition.schedule
        _need_tokens(actions, schedule.offsets[steps.stop - 1], f"steps {steps}")
        if prefix is not None and prefix.step != steps.start:
            raise ValueError(f"the prefix is at step {prefix.step}, the steps to score start at {steps.start}")
        if prefix is not None and len(actions) % prefix.batch:
            raise ValueError(f"{len(actions)} rows of actions cannot go on from the {prefix.batch} of the prefix")
        start = 0 if prefix is None and self.shares_keys else steps.start
        cache = None
        if prefix is not None and prefix.cache is not None and start > 0:
            cache = prefix.cache.shared(prefix.batch, len(actions) // prefix.batch)
        x = self.features(condition, actions, range(start, steps.stop), cache)
        return x[:, schedule.offsets[steps.start] - schedule.offsets[start] :]

    def prefill(self, condition: Condition, actions: Tensor, until: int, guidance: float = 0.0) -> DrawState:
        """The state after given actions, from one pass over them.

        While gradients are recorded, the state's keys and values carry them: ``hidden`` then gives the rows that go on
        from it the gradients of whole passes. Such a state is for ``hidden`` only.

        Args:
            actions: [batch, tokens, *event], at least all tokens of the first ``until`` steps.
            until: steps, at least 1.
            guidance: as in ``Sampling``, for what will be drawn afterwards.

        Raises:
            ValueError: if the actions do not cover the steps, or there is guidance while gradients are recorded.
        """
        schedule, recorded = condition.schedule, torch.is_grad_enabled()
        if not 0 < until <= len(schedule):
            raise ValueError(f"a prefix has 1 to {len(schedule)} steps, not {until}")
        if recorded and guidance:
            raise ValueError("a prefix with gradients is for scoring, which draws nothing: it takes no guidance")
        span = schedule.span(range(until))
        _need_tokens(actions, span.stop, f"{until} steps")
        state = self.start(condition, guidance)
        if state.cache is not None:
            cache: Cache = PrefixKeys() if recorded else state.cache
            rows = actions[:, span].repeat(state.copies, *(1 for _ in actions.shape[1:]))
            self.features(_with_null(condition) if state.copies == 2 else condition, rows, range(until), cache)
            state.cache = cache
        state.drawn, state.step = self.drawn(actions[:, span], schedule, until), until
        return state


def _need_tokens(actions: Tensor, tokens: int, what: str) -> None:
    if actions.shape[1] < tokens:
        raise ValueError(f"{what} need {tokens} tokens, the actions have {actions.shape[1]}")


def _with_null(condition: Condition) -> Condition:
    """All rows, and after them their unconditional twins."""
    null = {name: value.expand(condition.batch, *value.shape[1:]) for name, value in condition.null.items()}
    both = {name: torch.cat([value, null[name]]) for name, value in condition.features.items()}
    return Condition(condition.schedule, both, condition.null)
