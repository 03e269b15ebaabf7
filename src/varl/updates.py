"""The kinds of update: who is sampled, what is rewarded, which steps are trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from varl.algorithm import ESTIMATORS, Advantages, group_advantages, middle_return, token_masks
from varl.config import MaskConfig, MethodConfig
from varl.policy import Condition, Policy
from varl.rewards import RewardOutput
from varl.rollout import Rollout, replay, rollout, row_generators
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule
from varl.scoring import log_probs
from varl.transfer import sent

__all__ = [
    "Drawn",
    "Kind",
    "Plan",
    "advantages",
    "cancelled",
    "digests",
    "draw",
    "kind_of_update",
    "learnt_from",
    "masks",
    "plan",
    "record",
    "returns",
]

Kind = Literal["full", "prefix", "suffix"]


@dataclass(frozen=True)
class Plan:
    """The shape of one update.

    Attributes:
        kind: full, prefix or suffix.
        steps: the trained steps.
        heads: sequences drawn for every prompt, up to ``branch_at``.
        tails: continuations of each, to the end.
        branch_at: the step at which sequences branch; ``until`` if they do not.
        group: sequences of a prompt whose returns are compared.
        continuations: pictures that one trained sequence is valued by.
        until: steps that the pictures are drawn to.
        reuses: the sequences are those that the prefix update before drew, each of its prefixes' continuations a group.
    """

    kind: Kind
    steps: range
    heads: int
    tails: int
    branch_at: int
    group: int
    continuations: int
    until: int
    reuses: bool = False

    @property
    def pictures(self) -> int:
        """Pictures scored for every prompt."""
        return self.heads * self.tails

    @property
    def sequences(self) -> int:
        """Sequences trained for every prompt."""
        return self.pictures // self.continuations

    def portions(self, rows: range, at_once: int) -> Iterator[tuple[range, range]]:
        """Trained sequences as (heads, tails) to draw together: adjacent heads that all get the same tails.

        A head of which only some tails are asked for comes alone: whoever else draws it for the others computes it in
        the same batch, of one, and so to the same bits.

        Args:
            rows: some of all prompts' trained sequences, adjacent.
            at_once: finished sequences that one portion may hold, if it has more than one head; 0 is any number.
        """
        each = self.tails // self.continuations
        head, stop = rows.start // each, -(-rows.stop // each)
        while head < stop:
            first, last = max(rows.start - head * each, 0), min(rows.stop - head * each, each)
            tails = range(first * self.continuations, last * self.continuations)
            whole = len(tails) == self.tails
            count = min(max((at_once or self.tails * stop) // self.tails, 1), rows.stop // each - head) if whole else 1
            yield range(head, head + count), tails
            head += count


def kind_of_update(method: MethodConfig, update: int) -> Kind:
    """The kind of update number ``update`` (0-based): the alternation starts with its prefix updates."""
    if method.update != "alternate":
        return method.update
    return "prefix" if update % (method.prefix_updates + method.suffix_updates) < method.prefix_updates else "suffix"


def plan(kind: Kind, method: MethodConfig, schedule: ScaleSchedule) -> Plan:
    """The plan of an update of a kind (method, sections 3 and 7).

    Raises:
        ValueError: if the middle step, or the one at which prefixes are valued, is none of the schedule's.
    """
    total = len(schedule)
    if kind == "full":
        return Plan(kind, range(total), method.group, 1, total, method.group, 1, total)
    m = schedule.middle(method.middle)
    if kind == "prefix":
        until = total if method.value_at == "end" else schedule.middle(method.value_at)
        if until < m:
            raise ValueError(f"method.value_at is step {until}, and must not be before the middle step {m}")
        if until == m:
            _check_uncontinued(m, method)
        return Plan(kind, range(m), method.group, method.continuations, m, method.group, method.continuations, until)
    if method.suffix_state == "shared":
        return Plan(kind, range(m, total), 1, method.group, m, method.group, 1, total)
    if method.suffix_state == "reused":
        return Plan(kind, range(m, total), method.group, method.continuations, m, method.continuations, 1, total, True)
    return Plan(kind, range(m, total), method.group, 1, total, method.group, 1, total)


def _check_uncontinued(m: int, method: MethodConfig) -> None:
    """Refuse settings of continuations where prefixes are valued at the middle step itself."""
    if method.continuations > 1 or method.continuations_by != "policy":
        raise ValueError(
            f"method.value_at is the middle step, {m}, where prefixes are not continued: method.continuations must "
            f"be 1, by the policy; got {method.continuations}, by the {method.continuations_by}"
        )
    if ESTIMATORS[method.value].log_ratio:
        raise ValueError(
            f"method.value_at is the middle step, {m}, where prefixes are not continued: method.value {method.value} "
            "has no suffix to weigh; leave it out"
        )


@dataclass
class Drawn:
    """The sequences of one update.

    Attributes:
        trained: the sequences that are trained, [prompts * sequences] rows or those asked for, up to the end of the
            trained steps or further.
        whole: the finished sequences, up to the step at which they are valued; ``continuations`` adjacent rows belong
            to one of ``trained``.
    """

    trained: Rollout
    whole: Rollout


def draw(
    policy: Policy,
    condition: Condition,
    plan: Plan,
    sampling: Sampling,
    seed: Sequence[int],
    continued_by: Policy | None = None,
    at_once: int = 0,
    each: Callable[[Rollout], None] = lambda _: None,
    trained: range | None = None,
) -> Drawn:
    """Draw an update's sequences; every row has a generator of its own, seeded by (seed, stage, row).

    Args:
        condition: one row a prompt.
        continued_by: draws the continuations of a prefix update in the policy's place (the reference, for a middle
            return under it); its caches are filled by replaying the prefixes.
        at_once: finished sequences drawn together, which changes memory and not what is drawn; 0 is all.
        each: called with finished sequences as soon as there are some, in order.
        trained: draw only these of the trained sequences, with their continuations.
    """
    heads = condition.repeat(plan.heads)
    whole, prefixes = [], []
    first = row_generators((*seed, 0), heads.batch, condition.device)
    second = row_generators((*seed, 1), heads.batch * plan.tails, condition.device)
    trained = range(condition.batch * plan.sequences) if trained is None else trained
    for rows, tails in plan.portions(trained, at_once):
        part = heads.select(rows) if len(rows) < heads.batch else heads
        generators = [first[row] for row in rows]
        if plan.branch_at == plan.until:
            whole.append(rollout(policy, part, sampling, generators, until=plan.until))
            each(whole[-1])
            continue
        prefix = rollout(policy, part, sampling, generators, until=plan.branch_at, keep_state=True)
        author, fork_of = policy, prefix
        if continued_by is not None and plan.kind == "prefix":
            author = continued_by
            fork_of = replay(continued_by, part, prefix.actions, plan.branch_at, sampling.guidance)
        # Several prefixes are continued all at once, a single one perhaps by a few at a time.
        few = min(at_once or len(tails), len(tails))
        own = [second[row * plan.tails + tail] for row in rows for tail in tails]
        for generators in _batches(own, few * len(rows)):
            fork = len(generators) // len(rows)
            whole.append(rollout(author, part, sampling, generators, start=fork_of, fork=fork, until=plan.until))
            each(whole[-1])
        prefix.state = None
        prefixes.append(prefix)
    pictures = range(trained.start * plan.continuations, trained.stop * plan.continuations)
    finished = _joined(whole, condition.repeat(plan.pictures), pictures)
    if plan.kind != "prefix" or not prefixes:
        return Drawn(finished, finished)
    return Drawn(_joined(prefixes, heads, trained), finished)


def _batches(items: list[torch.Generator], size: int) -> list[list[torch.Generator]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _joined(parts: list[Rollout], condition: Condition, rows: range) -> Rollout:
    """Rollouts of the same steps as one, in order.

    Args:
        condition: of all rows there are; joined from the parts' own, it would hold many times what all rows share.
        rows: those that the parts hold.
    """
    if len(parts) == 1:
        return parts[0]
    actions = torch.cat([part.actions for part in parts])
    condition = condition.select(rows) if len(rows) < condition.batch else condition
    return Rollout(condition, actions, parts[0].steps, guidance=parts[0].guidance)


def returns(
    output: RewardOutput,
    drawn: Drawn,
    plan: Plan,
    method: MethodConfig,
    policy: Policy,
    reference: Policy | None,
    micro_batch: int,
    sampling: Sampling | None = None,
) -> tuple[Tensor, Tensor]:
    """The return of every trained sequence and whether it is valid, both [rows].

    For a prefix it is the middle return V_m over its continuations (Eq. 10); a prefix with a failed continuation is not
    valid: a mean of fewer draws is another number. Of other updates it is the reward.

    Args:
        sampling: what the continuations were drawn with; an estimator that weighs them by their log-ratio needs that
            of the distribution that they came from.
    """
    score, failed = output.score.view(-1, plan.continuations), output.failed.view(-1, plan.continuations)
    valid = ~failed.any(1)
    score = score.masked_fill(failed, 0)
    weighed = plan.kind == "prefix" and ESTIMATORS[method.value].log_ratio
    if plan.kind != "prefix" or (plan.continuations == 1 and not weighed):
        return score.squeeze(1), valid
    logp = reference_logp = None
    if weighed:
        if reference is None:
            raise ValueError(f"the value estimator {method.value!r} needs a reference policy")
        suffix = range(plan.branch_at, plan.until)
        logp, reference_logp = (
            _sequence_logp(model, drawn.whole, suffix, micro_batch, sampling).view(-1, plan.continuations)
            for model in (policy, reference)
        )
    value = middle_return(
        score,
        estimator=method.value,
        eta=method.eta,
        logp=logp,
        reference_logp=reference_logp,
        # The weight of one continuation, divided by itself, would say nothing.
        self_normalised=plan.continuations > 1,
    )
    return value, valid


@torch.no_grad()
def _sequence_logp(policy: Policy, whole: Rollout, steps: range, micro_batch: int, sampling: Sampling | None) -> Tensor:
    """Log-probability of all tokens of ``steps`` together under a sampling distribution, [rows], on the CPU."""
    parts, guidance = [], None if sampling is None or sampling.is_plain else sampling
    for rows in torch.arange(len(whole)).split(micro_batch):
        own = whole.actions[sent(rows, whole.actions.device)]
        scores = log_probs(policy, whole.condition.select(rows), own, steps, guidance=guidance)
        parts.append(scores.logp.sum(1))
    return torch.cat(parts).cpu()


def advantages(value_PG: Tensor, valid_PG: Tensor, method: MethodConfig) -> Advantages:
    """Group-relative advantages of the returns (method, section 4)."""
    return group_advantages(value_PG, valid_PG, kind=method.advantage)


def cancelled(learnt_from_P: Tensor, digests: Sequence[str], method: MethodConfig) -> bool:
    """Whether all that is left of an update's gradient is rounding, which AdamW would scale to a full step.

    So it is where every group that is learnt from drew a single sequence again and again: whatever its returns, its
    advantages add up to 0. The KL alone moves weights only if ``method.zero_variance`` asks for that.

    Args:
        digests: those of every sequence, group by group.
    """
    group = len(digests) // len(learnt_from_P)
    several = [len(set(digests[first : first + group])) > 1 for first in range(0, len(digests), group)]
    telling = (learnt_from_P & torch.tensor(several)).any()
    return method.zero_variance == "drop" and bool(learnt_from_P.any()) and not telling


def digests(sequences: Rollout, mask_BL: Tensor | None) -> list[str]:
    """A hash per sequence of what its term of the loss is made of, besides the advantage: its actions and its mask."""
    columns = [sequences.actions.flatten(1).cpu()] + ([] if mask_BL is None else [mask_BL.cpu()])
    rows = zip(*(column.contiguous().numpy() for column in columns), strict=True)
    return [hashlib.sha256(b"".join(part.tobytes() for part in row)).hexdigest() for row in rows]


def learnt_from(found: Advantages, method: MethodConfig) -> Tensor:
    """Which groups carry a term of the loss, bool [P]: neither dropped nor, unless their KL is kept, all alike."""
    return ~found.dropped_P if method.zero_variance == "kl" else ~found.dropped_P & ~found.zero_variance_P


def masks(
    output: RewardOutput, plan: Plan, schedule: ScaleSchedule, mask: MaskConfig, image_size: tuple[int, int]
) -> Tensor | None:
    """The propagated mask of every trained sequence, [rows, tokens of all steps]; None if masks are off.

    A reward without regions trains everything.
    """
    if not mask.enabled or output.regions is None:
        return None
    return token_masks(
        output.regions,
        image_size,
        schedule,
        continuations=plan.continuations,
        merge=mask.merge,
        propagation=mask.propagation,
        empty=mask.empty,
        mode=mask.coverage,
        shape=mask.shape,
        dilation=mask.dilation,
    )


def record(plan: Plan, scores: RewardOutput, value_PG: Tensor, found: Advantages) -> dict[str, Any]:
    """What the log says of all processes' scores, and of the returns and advantages made of them."""
    kept = ~found.dropped_P
    parts = {"score": scores.score, **scores.parts}
    # A part may be unknown of a picture that has a score.
    known = {name: value[~scores.failed & ~value.isnan()] for name, value in parts.items()}
    return {
        "kind": plan.kind,
        "reward": {name: float(value.mean()) if len(value) else None for name, value in known.items()},
        "failed_pictures": int(scores.failed.sum()),
        "failed_share": float(scores.failed.float().mean()),
        "return": float(value_PG[kept].mean()) if kept.any() else None,
        "group_std": float(found.group_std_P[kept].mean()) if kept.any() else None,
        "zero_variance_groups": float(found.zero_variance_P.float().mean()),
        "dropped_groups": float(found.dropped_P.float().mean()),
        "advantage_abs": float(found.advantage_PG.abs().mean()),
    }
