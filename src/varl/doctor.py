"""Checks that a policy, its caches and the reward do what training relies on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from varl.policy import Condition, Policy, Prompt
from varl.rewards import Reward
from varl.rewards.ocr import OcrReward
from varl.rollout import rollout, row_generators
from varl.sampling import Sampling
from varl.schedule import ScaleSchedule
from varl.scoring import log_probs

__all__ = ["Check", "check_enough", "check_legibility", "check_policy", "check_reader"]


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    fine: bool
    found: str


def check_enough(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that are too few for the checks.

    Raises:
        ValueError: if there are fewer than two: one cannot show that rows do not depend on one another.
    """
    if len(prompts) < 2:
        raise ValueError(f"the checks need at least 2 prompts, got {len(prompts)}")


def _fork_difference(policy: Policy, condition: Condition, m: int) -> float:
    """How far log-probabilities of continuations that branch at step ``m`` are from teacher-forced ones."""
    rows = condition.batch
    head = rollout(policy, condition, None, row_generators((1, m), rows), until=m, keep_state=True, logp=True)
    forked = rollout(policy, condition, None, row_generators((2, m), 2 * rows), start=head, fork=2, logp=True)
    assert forked.logp is not None
    with torch.no_grad():
        return float((forked.logp - log_probs(policy, forked.condition, forked.actions).logp).abs().max())


def check_policy(
    policy: Policy, prompts: Sequence[Prompt], tolerance: float = 1e-4, schedule: ScaleSchedule | None = None
) -> Iterator[Check]:
    """Check what policy gradients rest on, on sequences drawn from the policy's own distribution
    and, once, from a guided and truncated one.

    Args:
        prompts: at least two.
        tolerance: largest difference of log-probabilities, in nats, that rounding may explain.
        schedule: the grids; by default the policy's default.

    Raises:
        ValueError: if there are fewer than two prompts.
    """
    check_enough(prompts)
    condition = policy.condition(prompts, schedule)
    schedule = condition.schedule
    drawn = rollout(policy, condition, None, row_generators((0,), len(prompts)), logp=True)
    assert drawn.logp is not None
    with torch.no_grad():
        plain = log_probs(policy, condition, drawn.actions).logp
    trained = log_probs(policy, condition, drawn.actions).logp.detach()
    off = float(((trained - plain).exp() - 1).abs().max())
    yield Check("on-policy ratio is exactly 1", off == 0, f"largest |ratio - 1| = {off:.1e}")

    for step in range(len(schedule)):
        span = schedule.tokens_of(step)
        off = float((drawn.logp[:, span] - plain[:, span]).abs().max())
        h, w = schedule.grids[step]
        yield Check(f"rollout = replay, step {step + 1} ({h}x{w})", off < tolerance, f"largest difference {off:.1e}")

    with torch.no_grad():
        one = torch.cat(
            [log_probs(policy, condition.select([i]), drawn.actions[i : i + 1]).logp for i in range(len(prompts))]
        )
    off = float((one - plain).abs().max())
    yield Check("a row does not depend on its batch", off < tolerance, f"largest difference {off:.1e}")

    off = max(_fork_difference(policy, condition, m) for m in range(1, len(schedule)))
    yield Check("continuations of a fork = replay", off < tolerance, f"largest difference {off:.1e}, over every step")

    guided = Sampling(guidance=1.5, top_k=min(100, policy.classes))
    drawn_guided = rollout(policy, condition, guided, row_generators((3,), len(prompts)), logp=True)
    assert drawn_guided.logp is not None
    with torch.no_grad():
        replayed = log_probs(policy, condition, drawn_guided.actions, guidance=guided).logp
    off = float((drawn_guided.logp - replayed).abs().max())
    yield Check("guided, truncated rollout = replay", off < 10 * tolerance, f"largest difference {off:.1e}")

    again = rollout(policy, condition, None, row_generators((0,), len(prompts)))
    same = bool((again.actions == drawn.actions).all())
    yield Check("seeded draws repeat", same, "all tokens equal" if same else "tokens differ")


def check_reader(reward: Reward) -> Check:
    """Check that an OCR reward reads a word drawn in plain black on white."""
    picture = Image.new("RGB", (192, 64), "white")
    font = ImageFont.load_default(size=36)
    ImageDraw.Draw(picture).text((24, 10), "HARBEL", fill="black", font=font)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = pixels.view(1, 64, 192, 3).permute(0, 3, 1, 2).float() / 255
    output = reward(image, [Prompt("the word 'HARBEL'", words=("HARBEL",))])
    if bool(output.failed.any()):
        return Check("the reward is alive", False, "it failed on a plain picture")
    read = output.texts[0] if output.texts else ""
    fine = "harbel" in read.lower() if output.texts is not None else True
    return Check("the reward is alive", fine, f"read {read!r}, score {float(output.score[0]):.2f}")


def check_legibility(
    reward: Reward, prompts: Sequence[Prompt], most: int = 100, seconds: float = 5.0
) -> Iterator[Check]:
    """Check that the OCR reward's own engine reads the prompts' words where they are drawn in plain black on white.

    Args:
        most: different words to check, the shortest first.
        seconds: begin no other word after that.
    """
    if isinstance(reward, OcrReward):
        found = reward.legibility(prompts, most, seconds)
        if found is not None:
            yield Check("wanted words can be read", not found.unread, str(found))
