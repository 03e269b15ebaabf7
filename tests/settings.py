"""What every setting of a recipe changes, as cases for ``test_settings_method`` and ``test_settings_run``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

import tiny_runs
from varl.config import TrainConfig
from varl.errors import RunError
from varl.models.inkling import InklingConfig
from varl.run.metrics import read_metrics
from varl.sampling import Sampling
from varl.trainer import Trainer


def leaves(kind: type, path: str = "") -> Iterator[str]:
    """The names of all settings, those of sections in sections too."""
    hints = get_type_hints(kind)
    for own in fields(kind):
        hint, name = hints[own.name], f"{path}{own.name}"
        section = hint if is_dataclass(hint) else None
        if section is None:
            yield name
        else:
            yield from leaves(section, f"{name}.")  # type: ignore[arg-type]


def changed(config: Any, name: str, value: Any) -> Any:
    """A configuration with one setting, named by its path, at another value."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def with_all(config: Any, settings: dict[str, Any]) -> Any:
    """A configuration with several settings at other values, which are only checked together."""
    sections: dict[str, dict[str, Any]] = {}
    own = {name: value for name, value in settings.items() if "." not in name}
    for name, value in settings.items():
        if "." in name:
            first, _, rest = name.partition(".")
            sections.setdefault(first, {})[rest] = value
    return replace(config, **own, **{name: with_all(getattr(config, name), rest) for name, rest in sections.items()})


START = {
    "prompts.count": 5,
    "reward": "tiny_runs:score",
    "sampling.top_p": 0.95,
    "method.prompts": 2,
    "method.group": 3,
    "method.middle": "grid:2",
    "method.prefix_updates": 1,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_from": 1e-3,
    "optimizer.warmup_updates": 2,
    "evaluation.enabled": False,
    "run.updates": 3,
    "run.device": "cpu",
    "run.gallery_every": 0,
    "run.diagnose_every": 0,
}
EVALUATED = {"evaluation.enabled": True, "evaluation.count": 3, "run.updates": 1}
LORA = {"policy.lora.rank": 2}
REFERENCE = {"method.beta": 0.5}
EPOCHS = {
    "method.epochs": 2,
    "optimizer.learning_rate": 3e-2,
    "optimizer.warmup_updates": 0,
    "optimizer.warmup_from": None,
}
FLAT = {"reward": "settings:constant"}
BROKEN = {"reward": {"name": "tiny_runs:Failing", "raises": [0]}}


def constant(images: torch.Tensor, prompts: Any) -> list[float]:
    """A reward from which nothing can be learnt."""
    return [0.5] * len(images)


@dataclass(frozen=True)
class Case:
    """A setting at another value, and what else the run needs for that to matter; None is a setting's default."""

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)


CHANGES = {
    "policy.weights": Case("other.safetensors"),
    "policy.precision": Case("bfloat16"),
    "policy.rollout_precision": Case("bfloat16"),
    "policy.lora.rank": Case(3, LORA),
    "policy.lora.alpha": Case(64.0, LORA),
    "policy.lora.targets": Case(("qkv",), LORA),
    "policy.adapters": Case("adapters.safetensors"),
    "prompts.source": Case("inkling:held-out"),
    "prompts.count": Case(6),
    "prompts.seed": Case(1),
    "prompts.region_counts": Case({1: 1.0}, {"prompts.count": 30}),
    "reward": Case("tiny_runs:without_regions"),
    "sampling.guidance": Case(1.0),
    "sampling.top_k": Case(3),
    "sampling.top_p": Case(0.5),
    "sampling.temperature": Case(0.5),
    "method.update": Case("suffix", {"method.prefix_updates": None}),
    "method.prefix_updates": Case(2),
    "method.suffix_updates": Case(2),
    "method.middle": Case("grid:1"),
    "method.prompts": Case(3),
    "method.group": Case(4),
    "method.continuations": Case(3),
    "method.value": Case("mean"),
    "method.eta": Case(0.1),
    "method.continuations_by": Case("reference"),
    "method.value_at": Case("grid:3"),
    "method.suffix_state": Case("independent"),
    "method.prefix_gradient": Case(False),
    "method.advantage": Case("mean"),
    "method.alpha": Case(0.0),
    "method.rescale": Case(False),
    "method.mask.enabled": Case(False),
    "method.mask.propagation": Case("direct"),
    "method.mask.empty": Case("skip"),
    "method.mask.merge": Case("intersection"),
    "method.mask.coverage": Case("soft"),
    "method.mask.shape": Case("box"),
    "method.mask.dilation": Case(6.0),
    "method.mask.count": Case("masked"),
    "method.mask.kl": Case(True, REFERENCE),
    "method.clip": Case(1e-3, EPOCHS),
    "method.epochs": Case(2),
    "method.beta": Case(0.5),
    "method.kl": Case("k2", REFERENCE),
    "method.ratio": Case("step", EPOCHS),
    "method.logp": Case("sampling"),
    "method.zero_variance": Case("kl", FLAT),
    "optimizer.learning_rate": Case(6e-3),
    "optimizer.warmup_from": Case(2e-3),
    "optimizer.warmup_updates": Case(3),
    "optimizer.suffix_scale": Case(0.5, {"optimizer.moments": "segment"}),
    "optimizer.betas": Case((0.5, 0.9)),
    "optimizer.weight_decay": Case(0.5),
    "optimizer.clip_norm": Case(1e-2),
    "optimizer.moments": Case("segment"),
    "evaluation.source": Case("inkling:train", EVALUATED),
    "evaluation.count": Case(4, EVALUATED),
    "evaluation.prompt_seed": Case(2, EVALUATED),
    "evaluation.seed": Case(1, EVALUATED),
    "evaluation.sampling": Case(Sampling(top_k=1), EVALUATED),
    "evaluation.every": Case(1, {**EVALUATED, "run.updates": 2}),
    "evaluation.enabled": Case(True, {"run.updates": 1}),
    "run.updates": Case(2),
    "run.seed": Case(1),
    "run.ema": Case(0.5, {**EVALUATED, "run.updates": 3}),
    "run.failure_window": Case(1, BROKEN),
    "run.max_failed_share": Case(0.1, BROKEN),
    "run.save_every": Case(1),
    "run.keep": Case(1, {"run.save_every": 1}),
    "run.gallery_every": Case(1),
    "run.diagnose_every": Case(1),
}
"""Each changes the metrics, the evaluations or the files of a run by more than rounding."""
SAME = {
    "policy.checkpointing": Case(True),
    "run.threads": Case(1),
    "run.micro_batch": Case(2),
    "run.rollout_batch": Case(2),
    "run.overlap": Case(True),
    "parallel.mode": Case("fsdp2"),
    "parallel.timeout": Case(60.0),
}
"""Each changes how the work is done, and no number but by rounding."""
ELSEWHERE = {
    "policy.family": "tests/test_families.py",
    "policy.config": "tests/models/inkling/test_checkpoint.py",
    "policy.resolution": "tests/models/infinity/test_schedules.py",
    "policy.aspect_ratio": "tests/models/infinity/test_schedules.py",
    "policy.compile": "tests/test_compile.py",
    "evaluation.alarm_window": "tests/evaluation/test_alarm.py",
    "evaluation.alarm_stops": "tests/evaluation/test_alarm.py",
    "run.out": "tests/run/test_folder.py",
    "run.device": "tests/test_cli.py",
    "run.deterministic": "tests/test_deterministic.py",
    "parallel.param_dtype": "tests/test_distributed.py",
    "parallel.cpu_offload": "tests/test_distributed.py",
}
"""Needs another family, several processes, a device or a longer run: where it is tested."""


def fill(room: Path) -> Path:
    """Two sets of weights, and adapters, in a folder."""
    shape = tiny_runs.SHAPE | {"grids": [1, 2, 3, 6], "width": 16, "depth": 1}
    tiny_runs.tiny_weights(room / "tiny.safetensors", InklingConfig(**shape))
    other = Trainer(made(room, {"optimizer.weight_decay": 0.0}, room / "first"))
    other.run()
    (room / "first" / "weights.safetensors").rename(room / "other.safetensors")
    Trainer(made(room, LORA, room / "second")).run()
    (room / "second" / "adapters.safetensors").rename(room / "adapters.safetensors")
    return room


def made(room: Path, settings: dict[str, Any], out: Path) -> TrainConfig:
    """A small run with some settings at other values."""
    chosen = START | {"policy.weights": "tiny.safetensors"} | settings
    if chosen.get("evaluation.enabled") is False and "evaluation.count" in settings:
        raise AssertionError("a case that evaluates must say so")
    for name in ("policy.weights", "policy.adapters"):
        if name in chosen:
            chosen[name] = str(room / chosen[name])
    given = {name: value for name, value in chosen.items() if value is not None}
    return with_all(TrainConfig(), given | {"run.out": out})


def left_behind(config: TrainConfig) -> dict[str, Any]:
    """What a run leaves: its numbers and files, and what it was stopped by."""
    trainer = Trainer(config)
    try:
        trainer.run()
        stopped = ""
    except RunError as error:
        stopped = str(error)
    out = config.run.out
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(out)]
    kept = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if "tensorboard" not in path.parts]
    evaluations = [json.loads(path.read_text())["per_prompt"] for path in sorted(out.glob("evaluations/*.json"))]
    return {"lines": lines, "files": kept, "evaluations": evaluations, "stopped": stopped}


def near(one: Any, other: Any) -> bool:
    """Whether nested values are equal but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(near(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-7)
    return one == other


BASES: dict[str, dict[str, Any]] = {}


def base(room: Path, beside: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the run leaves without the change; each such run is made once."""
    key = repr(sorted(beside.items(), key=str))
    if key not in BASES:
        BASES[key] = left_behind(made(room, beside, out))
    return BASES[key]


def matters(room: Path, tmp_path: Path, name: str) -> bool:
    """Whether a setting's case changes what a run leaves behind by more than rounding."""
    case = CHANGES[name]
    before = base(room, case.beside, tmp_path / "before")
    return not near(left_behind(made(room, case.beside | {name: case.value}, tmp_path / "after")), before)
