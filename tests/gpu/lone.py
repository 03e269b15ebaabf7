"""Runs in one process that acts as one of several: every collective is really made, among one.

For ``processes.run``; the folder holds tiny weights, and ``device.txt`` with the device's name.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from test_trainer import make_config
from varl.config import AdapterConfig, EvaluationConfig, ParallelConfig, TrainConfig
from varl.distributed import Distributed
from varl.run.metrics import read_metrics
from varl.trainer import Trainer

__all__ = ["MODES", "RESUMED", "Several", "config", "ran", "runs"]


class Several(int):
    """A number of processes that is 1 and does not say so."""

    def __eq__(self, other: object) -> bool:
        return other != 1 and super().__eq__(other)

    def __gt__(self, other: float) -> bool:
        return True

    __hash__ = int.__hash__


MODES: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {"parallel": ParallelConfig("ddp")},
    "fsdp2": {"parallel": ParallelConfig("fsdp2")},
    "fsdp2, adapters": {"parallel": ParallelConfig("fsdp2"), "lora": 2},
    "fsdp2, offload": {"parallel": ParallelConfig("fsdp2", cpu_offload=True)},
    "alone, bf16": {"precision": "bfloat16"},
    "fsdp2, bf16": {"parallel": ParallelConfig("fsdp2", "bfloat16"), "precision": "bfloat16"},
    "alone, adapters": {"lora": 2},
}
"""Settings of a run by the name of the way that the work is shared."""
RESUMED = ("ddp", "fsdp2", "fsdp2, offload")


def config(folder: Path, name: str, updates: int, device: str) -> TrainConfig:
    """A short run of a mode."""
    options = dict(MODES[name])
    parallel, lora = options.pop("parallel", ParallelConfig()), options.pop("lora", 0)
    precision = options.pop("precision", "float32")
    run = {"device": device, "updates": updates, "save_every": 2, "ema": 0.5, "diagnose_every": 2}
    method = {"prefix_updates": 1, "suffix_state": "reused", "beta": 0.1}
    made = make_config(folder / "tiny.safetensors", folder / name, run=run, **method, **options)
    policy = replace(made.policy, precision=precision, lora=AdapterConfig(rank=lora))
    return replace(
        made,
        policy=policy,
        parallel=parallel,
        reward="tiny_runs:score",
        evaluation=EvaluationConfig(count=3, enabled=name in RESUMED),
    )


def ran(made: TrainConfig, size: int) -> dict[str, Any]:
    """A run by one of ``size`` processes: its metrics, its weights, and what was sent how often."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather")}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            first = next(x for x in arguments if isinstance(x, torch.Tensor | list))
            one = first[0] if isinstance(first, list) else first
            if one.numel() > 1:  # a number alone is no gradient
                sent[f"{name} on {one.device.type}"] += 1
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(dist, name, counted(name))
    try:
        distributed = Distributed(made.parallel, torch.device(made.run.device), 0, size, 0)
        trainer = Trainer(made, distributed)
        trainer.run()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(made.run.out)]
    return {"lines": lines, "weights": load_file(made.run.out / "weights.safetensors"), "sent": dict(sent)}


def runs(folder: Path) -> dict[str, Any]:
    """Every mode: three updates at once; some are also stopped after two, and gone on with."""
    device = (folder / "device.txt").read_text()
    found: dict[str, Any] = {"backend": ""}
    for name, options in MODES.items():
        several = Several(1) if options.get("parallel") == ParallelConfig("ddp") else 1
        found[name] = ran(config(folder, name, 3, device), several)
        if dist.is_initialized():
            found["backend"] = str(dist.get_backend_config())
            dist.destroy_process_group()
        if name in RESUMED:
            stopped = folder / f"{name}, stopped"
            for updates in (2, 3):
                made = config(folder, name, updates, device)
                resumed = ran(replace(made, run=replace(made.run, out=stopped)), several)
                if dist.is_initialized():
                    dist.destroy_process_group()
            found[f"{name}, resumed"] = resumed
    assert os.environ["WORLD_SIZE"] == "1"
    return found
