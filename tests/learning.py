"""What the tests of the learner share: small learners, batches, and their gradients."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bits import SCHEDULE, labels
from small import make_prompts
from varl import Sampling, rollout, updates
from varl.config import MethodConfig, OptimizerConfig
from varl.learner import Batch, Learner
from varl.models.inkling import Inkling
from varl.policy import Policy
from varl.rollout import row_generators

HUGE = 1e9
ROWS = 8


def stage(_: str) -> nullcontext[None]:
    return nullcontext()


def learner(
    policy: Policy,
    method: MethodConfig,
    reference: Policy | None = None,
    micro_batch: int = ROWS,
    sampling: Sampling | None = None,
    **options: float,
) -> Learner:
    settings = {"clip_norm": HUGE, "learning_rate": 1e-3, "warmup_updates": 0} | options
    return Learner(policy, reference, method, OptimizerConfig(**settings), sampling or Sampling(), micro_batch)


def batch(policy: Policy, steps: range = range(3), seed: int = 0, mask: bool = True) -> Batch:
    """A batch of bits, with half of a mask and a dropped group."""
    g = torch.Generator().manual_seed(seed)
    condition = policy.condition(labels(ROWS))
    span = SCHEDULE.span(steps)
    return Batch(
        sequences=rollout(policy, condition, None, row_generators((seed,), ROWS)),
        steps=steps,
        advantage_B=torch.randn(ROWS, generator=g, dtype=torch.float64),
        valid_B=torch.arange(ROWS) // 2 != 1,
        mask_BL=(torch.rand(ROWS, span.stop - span.start, generator=g) < 0.5).float() if mask else None,
    )


def gradients(policy: Policy) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.trainable.parameters()]


def learned(policy: Policy, made: Batch, *args, **options) -> tuple[list[Tensor], dict]:
    """The gradients of one step from this policy, which is left as it was."""
    own = copy.deepcopy(policy)
    log = learner(own, *args, **options).learn(made, stage, diagnose=True)
    return gradients(own), log


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=1e-5)
    assert max(float(x.abs().max()) for x in a) > 100 * tolerance


@contextmanager
def counting(policy: Inkling) -> Iterator[dict[str, int]]:
    """Tokens through the first block and rows through the head."""
    found = {"tokens": 0, "head": 0}

    def count(name: str) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            found[name] += given[0][..., 0].numel()

        return hook

    hooks = [
        module.register_forward_pre_hook(count(name))
        for name, module in (("tokens", policy.transformer.blocks[0]), ("head", policy.transformer.head))
    ]
    yield found
    for hook in hooks:
        hook.remove()


def drawn(policy: Inkling, kind: Any, method: MethodConfig, mask: bool = False) -> Batch:
    plan = updates.plan(kind, method, policy.default_schedule)
    made = updates.draw(policy, policy.condition(make_prompts(2)), plan, Sampling(), (0,))
    span, rows = policy.default_schedule.span(plan.steps), 2 * plan.group
    g = torch.Generator().manual_seed(0)
    return Batch(
        made.trained,
        plan.steps,
        torch.randn(rows, generator=g),
        torch.ones(rows, dtype=torch.bool),
        (torch.rand(rows, span.stop - span.start, generator=g) < 0.1).float() if mask else None,
        shared=plan.tails if kind == "suffix" else 1,
    )
