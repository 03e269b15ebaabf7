"""What each of several processes does in the tests of ``varl.distributed``; see ``processes.run``."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import families
import varl.loading
from small import make_inkling, make_prompts
from varl.adapters import WithoutAdapters
from varl.config import AdapterConfig, MethodConfig, OptimizerConfig, ParallelConfig, PolicyConfig
from varl.distributed import Distributed
from varl.learner import Batch, Learner
from varl.loading import autocast, frozen_copy, prepare
from varl.policy import Policy, Prompt
from varl.rollout import Rollout
from varl.sampling import Sampling

ROWS = 12


@dataclass(frozen=True)
class Case:
    """One way to learn from given sequences."""

    name: str
    mode: str = "ddp"
    micro_batch: int = 4
    method: MethodConfig = field(default_factory=lambda: MethodConfig(beta=0.1, kl="k3"))
    lora: int = 0
    precision: str = "float32"
    param_dtype: str = "float32"
    checkpointing: bool = False
    offload: bool = False
    compiled: bool = False
    group: int = 1

    @property
    def diagnosed(self) -> bool:
        """The norms by step are those of one micro-batch a process: of the same rows as in one process if of all."""
        return self.micro_batch == ROWS

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(cast(Any, self.mode), cast(Any, self.param_dtype), self.offload)


EXACT = MethodConfig(beta=0.1, kl="exact")
FROZEN = MethodConfig(beta=0.1, prefix_gradient=False)
CASES = [
    Case("ddp"),
    Case("ddp, one by one", micro_batch=1),
    Case("fsdp2", "fsdp2"),
    Case("fsdp2, all at once", "fsdp2", micro_batch=ROWS),
    Case("fsdp2, checkpointing", "fsdp2", checkpointing=True),
    Case("fsdp2, offload", "fsdp2", offload=True),
    Case("fsdp2, exact KL", "fsdp2", method=EXACT),
    Case("ddp, shared prefix", group=4),
    Case("fsdp2, shared prefix", "fsdp2", group=4),
    Case("fsdp2, shared prefix, pair by pair", "fsdp2", micro_batch=2, group=4),
    Case("fsdp2, shared prefix, one by one", "fsdp2", micro_batch=1, group=4),
    Case("fsdp2, shared prefix, checkpointing", "fsdp2", micro_batch=2, group=4, checkpointing=True),
    Case("fsdp2, shared prefix without gradient", "fsdp2", group=4, method=FROZEN),
    Case("fsdp2, shared prefix, adapters", "fsdp2", group=4, lora=2),
    Case("ddp, adapters", lora=2),
    Case("fsdp2, adapters", "fsdp2", lora=2),
    Case("fsdp2, adapters, exact KL", "fsdp2", lora=2, method=EXACT),
]
HALVED = [
    Case("ddp, bf16", precision="bfloat16"),
    Case("fsdp2, bf16", "fsdp2", precision="bfloat16"),
    Case("fsdp2, bf16 gathered", "fsdp2", precision="bfloat16", param_dtype="bfloat16"),
    Case("fsdp2, bf16 gathered, adapters", "fsdp2", precision="bfloat16", param_dtype="bfloat16", lora=2),
]
DIAGNOSED = [Case("ddp, all at once", micro_batch=ROWS)]
COMPILED = [
    Case("ddp, compiled", compiled=True),
    Case("fsdp2, compiled, shared prefix, checkpointing", "fsdp2", compiled=True, group=4, checkpointing=True),
]


def of_family(name: str) -> tuple[Any, list[Prompt]]:
    """What makes a family's tiny policy, and prompts for it."""
    if name == "inkling":
        return make_inkling, make_prompts(4)
    return next(family for family in families.FAMILIES if family.name == name).make, families.prompts(4)


def learn(name: str, case: Case, distributed: Distributed | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One step on fixed sequences of a family: its record, and the gradient that the optimizer was given.

    Args:
        distributed: the processes that share the sequences; None for one process that learns from all.
    """
    make, prompts = of_family(name)
    varl.loading.load_policy = lambda *_: make()
    config = PolicyConfig(
        make().family,
        precision=cast(Any, case.precision),
        checkpointing=case.checkpointing,
        compile=case.compiled,
        lora=AdapterConfig(rank=case.lora),
    )
    torch.manual_seed(7)
    policy = prepare(config, torch.device("cpu"))
    if case.lora:
        for key, parameter in policy.trainable.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
    reference = cast(Policy, WithoutAdapters(policy)) if case.lora else frozen_copy(policy)
    if not case.lora:
        families.shaken(reference, 0.05)
    condition = policy.condition([prompts[row // case.group % 4] for row in range(ROWS)])
    schedule = condition.schedule
    steps = range(2, len(schedule))
    actions = families.actions_of(policy, ROWS, schedule.tokens)
    span = schedule.span(range(steps.start))
    actions[:, span] = actions[:: case.group, span].repeat_interleave(case.group, 0)
    generator = torch.Generator().manual_seed(3)
    advantage = torch.randn(ROWS, generator=generator)
    # The second of two processes has fewer sequences to learn from than the first.
    valid = torch.tensor([row not in (1, 6, 7, 8, 9) for row in range(ROWS)])
    mask = (torch.rand(ROWS, schedule.tokens, generator=generator) < 0.6).float()[:, schedule.span(steps)]
    mine = range(ROWS)
    if distributed is not None:
        mine = distributed.share(ROWS)
        for model in [policy] if case.lora else [policy, reference]:
            distributed.place(model, case.precision)
    rows = torch.tensor(mine)
    learner = Learner(
        policy, reference, case.method, OptimizerConfig(), Sampling(), min(case.micro_batch, len(mine)), distributed
    )
    gradients: dict[str, Tensor] = {}
    clip = learner.distributed.clip

    def record(parameters: Any, largest: float) -> float:
        for key, parameter in policy.trainable.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                gradients[key] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        return clip(parameters, largest)

    learner.distributed.clip = record  # type: ignore[method-assign]
    own = Rollout(condition.select(rows), actions[rows], len(schedule))
    shared = math.gcd(len(mine), case.group)
    batch = Batch(own, steps, advantage[rows], valid[rows], mask[rows], shared=shared, total=ROWS)
    with autocast(config, torch.device("cpu"), keep_casts=not learner.distributed.sharded):
        log = learner.learn(batch, lambda _: nullcontext(), diagnose=case.diagnosed)
    return log, gradients


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients by the norm of one."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    change = sum(float((found[key] - expected[key]).square().sum()) for key in expected)
    return (change / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


def tried_in(case: Case, number: int) -> list[str]:
    """One case is tried in every family, each of the others in one after another, and compiled in the smallest."""
    names = ["inkling", *(family.name for family in families.FAMILIES)]
    if case.compiled:
        return names[:1]
    return names if case.name == "fsdp2, shared prefix" else [names[number % len(names)]]


def gradients(folder: Path) -> dict[str, dict[str, float]]:
    """By family and case, in the first process: relative differences of loss, gradient and norm to one process."""
    found = {}
    # Graphs as torch makes them, without the minutes of its compiler.
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign]
    for number, case in enumerate(CASES + HALVED + DIAGNOSED + COMPILED):
        for name in tried_in(case, number):
            distributed = Distributed.here(case.parallel, torch.device("cpu"))
            log, gradient = learn(name, case, distributed)
            if distributed.main:
                expected, whole = learn(name, case, None)
                loss, norm = (abs(log[key] / expected[key] - 1) for key in ("loss", "gradient_norm"))
                found[f"{name}: {case.name}"] = {"loss": loss, "gradient": difference(gradient, whole), "norm": norm}
                if case.diagnosed:
                    both = zip(log["gradient_norm_by_step"], expected["gradient_norm_by_step"], strict=True)
                    found[f"{name}: {case.name}"]["norm by step"] = max(abs(one / same - 1) for one, same in both)
    return found
