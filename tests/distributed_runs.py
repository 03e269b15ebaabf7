"""Whole runs of a tiny policy in several processes, for the tests of ``varl.distributed``; see ``processes.run``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from benchmarks import communication
from benchmarks.communication import size_of
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

import varl.loading
from collectives import Collectives
from patience import PATIENCE
from varl import rollout, sizing, updates
from varl.config import (
    AdapterConfig,
    EvaluationConfig,
    MethodConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.distributed import Distributed
from varl.loading import prepare
from varl.models import load_policy
from varl.rollout import row_generators
from varl.run.metrics import read_metrics
from varl.sampling import Sampling
from varl.trainer import Trainer

METHODS = {
    "alternate": MethodConfig(prompts=3, group=4, middle="grid:6", prefix_updates=2),
    "full": MethodConfig(update="full", prompts=3, group=4, epochs=2),
    "reused": MethodConfig(prompts=3, group=4, middle="grid:6", prefix_updates=1, suffix_state="reused"),
    "soft": MethodConfig(update="prefix", prompts=3, group=4, middle="grid:6", value="soft-reference"),
    "segments": MethodConfig(prompts=3, group=4, middle="grid:6", prefix_updates=1),
}
"""Kinds of update. Of 12 sequences in groups of 4, two processes split a group and three do not.

In ``segments`` prefix and suffix updates have moments of their own.
"""
RUNS = {
    1: [(kind, "ddp") for kind in METHODS],
    2: [("alternate", "ddp"), ("alternate", "fsdp2"), ("reused", "fsdp2"), ("soft", "fsdp2"), ("segments", "fsdp2")],
    3: [("alternate", "ddp"), ("full", "fsdp2"), ("segments", "ddp")],
}
"""By number of processes: the kinds and modes that are run."""


def config(folder: Path, out: str, mode: str = "ddp", kind: str = "alternate", **run: Any) -> TrainConfig:
    own: bool = kind == "segments"
    return TrainConfig(
        policy=PolicyConfig(weights=str(folder / "tiny.safetensors")),
        prompts=PromptConfig(count=7),
        reward="tiny_runs:score",
        sampling=Sampling(top_p=0.95),
        method=METHODS[kind],
        optimizer=OptimizerConfig(1e-3, 1e-4, 4, **({"suffix_scale": 0.5, "moments": "segment"} if own else {})),
        evaluation=EvaluationConfig(count=5),
        run=RunConfig(
            **{"out": folder / out, "updates": 3, "save_every": 3, "micro_batch": 5, "device": "cpu", "ema": 0.5}
            | {"gallery_every": 2, "diagnose_every": 0}
            | run
        ),
        parallel=ParallelConfig(cast(Any, mode)),
    )


@contextmanager
def in_double() -> Iterator[None]:
    """Policies are loaded in fp64."""
    varl.loading.load_policy = lambda *given: cast(nn.Module, load_policy(*given)).double()
    try:
        yield
    finally:
        varl.loading.load_policy = load_policy


def train(made: TrainConfig) -> dict[str, Any]:
    """A whole run: the actions that this process drew in every update, and what the run left."""
    drawn: list[torch.Tensor] = []
    draw = updates.draw

    def recording(*arguments: Any, **options: Any) -> updates.Drawn:
        found = draw(*arguments, **options)
        drawn.append(found.whole.actions)
        return found

    updates.draw = recording
    try:
        trainer = Trainer(made)
        trainer.run()
    finally:
        updates.draw = draw
    found: dict[str, Any] = {"actions": drawn}
    if trainer.distributed.main:
        found["metrics"] = [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(made.run.out)]
        found["weights"] = load_file(made.run.out / "weights.safetensors")
        found["evaluations"] = [
            {"images": e.images, "rewards": torch.from_numpy(e.rewards)}
            for e in map(trainer.folder.result, trainer.folder.evaluated())
            if e is not None
        ]
    return found


def in_fp64(folder: Path, size: int) -> dict[str, Any]:
    """Runs in fp64, by kind and mode."""
    with in_double():
        return {f"{kind}, {m}": train(config(folder, f"{size}-{kind}-{m}", m, kind)) for kind, m in RUNS[size]}


def two(folder: Path) -> dict[str, Any]:
    """What two processes do."""
    _train_adapters(folder)
    return {"runs": in_fp64(folder, 2), "measured": _measured(folder), "counted": _counted(folder)}


def _measured(folder: Path) -> dict[str, Any]:
    """A run under fsdp2 that chooses its micro-batches, and the gradient's norms by step in its log.

    Of its 6 sequences the first process would learn from all at once, the second from 4.
    """
    costs = ({1: 1.0, 2: 1.2, 4: 2.0, 6: 2.4}, {1: 1.0, 2: 1.4, 4: 2.2, 6: 6.0})[int(os.environ["RANK"])]
    seconds, filled = sizing._seconds, sizing._filled

    def told(learner: Any, *arguments: Any) -> float:
        seconds(learner, *arguments)
        return costs[learner.micro_batch]

    sizing._seconds, sizing._filled = told, lambda device: 0.0
    try:
        with in_double():
            run = train(config(folder, "measured", "fsdp2", micro_batch="auto", diagnose_every=1))
    finally:
        sizing._seconds, sizing._filled = seconds, filled
    norms = [record.pop("gradient_norm_by_step") for record in run.get("metrics", [])]
    sizes = json.loads((folder / "measured" / "micro_batches.json").read_text())
    return {"run": run, "norms": norms, "sizes": sizes}


def three(folder: Path) -> dict[str, Any]:
    """What three processes do; the last run is one that two go on with."""
    runs = in_fp64(folder, 3)
    with in_double():
        train(config(folder, "resumed", "fsdp2", "segments", updates=2))
    return {"runs": runs}


def one_begins(folder: Path) -> None:
    """One update of a run whose next update reuses its pictures; two processes go on with it."""
    with in_double():
        train(config(folder, "halved", kind="reused", updates=1))


def two_again(folder: Path) -> dict[str, Any]:
    """The rest of the runs that three processes and one began, sharded otherwise."""
    with in_double():
        three = train(config(folder, "resumed", kind="segments"))
        one = train(config(folder, "halved", "fsdp2", "reused"))
    return {"three": three, "one": one}


def _counted(folder: Path) -> dict[str, Any]:
    """Collectives of a rollout under fsdp2, how many units are sharded, and how many scales are drawn."""
    trainer = Trainer(config(folder, "counted", "fsdp2"))
    trainer.step()
    units = [part for part in cast(nn.Module, trainer.policy).modules() if isinstance(part, FSDPModule)]
    condition = trainer.policy.condition(trainer.held_out, trainer.schedule)
    with Collectives() as sent, trainer.distributed.gathered(trainer.policy):
        drawn = rollout(trainer.policy, condition, Sampling(), row_generators((0,), condition.batch))
    return {"units": len(units), "scales": drawn.steps, "sent": dict(sent.calls), "bytes": _bytes(folder)}


def _bytes(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """By kind of update: what was sent in an update, and the closed form of it."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kind in ("prefix", "suffix"):
        middle = "quarter" if kind == "full" else "grid:6"
        method = MethodConfig(update=cast(Any, kind), prompts=4, group=3, middle=middle)
        for mode in ("ddp", "fsdp2"):
            made = replace(config(folder, f"bytes-{kind}-{mode}", mode, micro_batch=3, ema=0.0), method=method)
            trainer = Trainer(replace(made, evaluation=EvaluationConfig(enabled=False)))
            size = size_of(prepare(made.policy, torch.device("cpu")))
            with Collectives() as sent:
                trainer.step()
            form = communication.sent(made, cast(Any, kind), size, trainer.schedule, 2)
            gathered = form.gathered_to_draw + form.gathered_to_learn + form.gathered_for_reference
            found[f"{kind}, {mode}"] = {
                "all-gather": (4.0 * sent.numbers["allgather_base"], gathered),
                "reduce-scatter": (4.0 * sent.numbers["reduce_scatter_base"], form.reduce_scattered),
                "all-reduce": (4.0 * sent.numbers["allreduce"], form.all_reduced),
            }
    return found


def _train_adapters(folder: Path) -> None:
    """Runs with adapters in bf16, in both modes."""
    for mode in ("ddp", "fsdp2"):
        made = config(folder, f"lora-{mode}", mode)
        # Adapters begin at random, in every process with other numbers; those of the first hold.
        torch.manual_seed(int(os.environ["RANK"]))
        train(replace(made, policy=replace(made.policy, precision="bfloat16", lora=AdapterConfig(rank=2))))


def one_fails(folder: Path) -> dict[str, Any]:
    """The second process fails while the first is busy, and asks for nothing of the others."""
    distributed = Distributed.here(ParallelConfig(), torch.device("cpu"))
    with distributed.guarded():
        if distributed.rank == 1:
            raise ValueError("the disk is full")
        time.sleep(2 * PATIENCE)
    return {}
