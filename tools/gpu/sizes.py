"""Real sizes with random weights: what an update costs, how much of the machine it uses, and the memory it takes.

python3 -m tools.gpu.sizes --device cuda --machine day/1-machine.json --out day/4-sizes.json

VAR d16 and d30 at 256 px, Infinity-2B at a million pixels with LoRA, Switti at 512 px, by their recipes, with fewer
prompts: a prefix and a suffix update each, after one of both kinds that loads kernels and makes the optimizer's
moments. The reward costs nothing; texts are random features. Every update is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks import flops
from benchmarks.measure import Settings, product, timed

import varl
from tools.gpu.peaks import Counter, by_phase, counter
from tools.gpu.texts import TOKENS, random_texts
from varl import updates
from varl.cli import COMMANDS, _settings
from varl.config import TrainConfig
from varl.memory import keep_freed
from varl.plan import Estimate, estimate
from varl.trainer import Trainer

__all__ = ["SIZES", "Size", "config_of", "faults", "main", "measure", "product_of"]

ROOT = Path(__file__).parents[2]
KINDS: tuple[updates.Kind, ...] = ("prefix", "suffix")
OF_PRODUCT = 0.45
"""Goal: FLOP/s of forward and backward over those of the bf16 product, at least."""
OF_PLAN = 0.15
"""Goal: how far the peak of memory may be from the plan's, relative to it."""
LIMIT_S, FIRST_S = 170.0, 8.0
"""Nothing is begun that would end later than so many seconds after the start; a model's first update may take the
second number."""
Write = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """How many sequences of a published model an update takes.

    Batches are those of its recipe, so that memory and speed are those of a whole run.

    Attributes:
        prompts, group: enough for two passes of the recipe's micro-batch, so that one meets the other's gradients.
        words: other settings.
        small: settings of a tiny model of the same family in their place.
    """

    prompts: int
    group: int
    small: tuple[str, ...]
    words: tuple[str, ...] = ()


WORDS = (
    *("--policy.weights", "random", "--reward", "benchmarks.shapes:brightness", "--evaluation.enabled", "false"),
    *("--method.prefix_updates", "1", "--method.suffix_updates", "1", "--run.updates", "4"),
    *("--run.gallery_every", "0", "--run.diagnose_every", "0"),
)
TEXTS = ("--prompts.source", "inkling:train", "--prompts.count", "64")


def _tiny(**config: Any) -> tuple[str, ...]:
    config["transformer"] = {"depth": 4, "embed_dim": 128, "num_heads": 4} | config["transformer"]
    batches = ("--run.micro_batch", "2", "--run.rollout_batch", "4", "--method.prompts", "1", "--method.group", "4")
    return (*batches, "--method.middle", "2", "--policy.config", json.dumps(config))


GRIDS = [1, 2, 4, 6]
VQVAE = {"ch": 32, "num_res_blocks": 1, "vocab_size": 1024, "z_channels": 8}
CLIP = {"Cvae": 8, "V": 1024, "context_dim": 64, "pooled_dim": 32}
T5 = {"block_chunks": 2, "text_channels": 128, "text_maxlen": 64}
BITS = {"codebook_dim": 8, "base_ch": 32, "num_res_blocks": 1}
SIZES = {
    "var-d16": Size(8, 16, _tiny(transformer={"patch_nums": GRIDS}, tokenizer=VQVAE)),
    "infinity-2b": Size(
        1,
        4,
        _tiny(transformer=T5, tokenizer=BITS, scale_schedule=[[side, side] for side in GRIDS]),
        TEXTS,
    ),
    "var-d30": Size(1, 16, _tiny(transformer={"patch_nums": GRIDS, "depth": 6}, tokenizer=VQVAE)),
    "switti-512": Size(1, 8, _tiny(transformer={"patch_nums": GRIDS, **CLIP}, tokenizer={"ch": 32}), TEXTS),
}
"""By the name of the recipe, those that tell the most first."""


def config_of(name: str, device: str, out: Path, small: bool = False) -> TrainConfig:
    """The recipe of a size with random weights, as ``varl train`` would read it, for a few updates."""
    size, recipe = SIZES[name], ROOT / "recipes" / f"{name}.yaml"
    few = size.small if small else ("--method.prompts", str(size.prompts), "--method.group", str(size.group))
    own = ("--run.device", device, "--run.out", str(out))
    return _settings("train", COMMANDS["train"], [str(recipe), *WORDS, *size.words, *few, *own])


def product_of(machine: Path | None, device: str) -> tuple[float, str]:
    """TFLOP/s of a large bf16 product and where they are from: the machine's file, or measured here if none says it."""
    why = "no file was given"
    if machine is not None:
        try:
            return float(json.loads(machine.read_text())["ceilings"]["bf16_tflops"]), machine.name
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{machine} does not say ceilings.bf16_tflops, {error!r}"
    work, operations = product(Settings(device=device), torch.bfloat16)
    return operations / min(timed(work, device) for _ in range(4)) / 1e12, f"measured here: {why}"


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with an update, by its record: no step taken, a number that is not finite, pictures that failed."""
    wrong = [f"{name} is {record[name]}" for name in ("loss", "gradient_norm") if not math.isfinite(record[name])]
    if record["gradient_norm"] == 0:
        wrong.append("the gradient is 0")
    if record["skipped"]:
        wrong.append("no step was taken")
    if record["failed_pictures"]:
        wrong.append(f"{record['failed_pictures']} pictures failed")
    return wrong


def measure(config: TrainConfig, entry: dict[str, Any], write: Write, left: Callable[[], float], tflops: float) -> None:
    """Take updates of a configuration, each kind twice, and note in ``entry`` what they cost.

    The second one of a kind counts; of the first is said so, if there is no time for the second.

    Args:
        write: called after every update.
        left: the seconds that are left.
        tflops: TFLOP/s of the product to compare with.

    Raises:
        RuntimeError: if an update took no step, or a number was not finite.
    """
    start, planned = time.perf_counter(), estimate(config)
    entry |= {"planned_gb": planned.peak() / 1e9, "updates": {}, "skipped": []}
    memory = counter(torch.device(config.run.device))
    with random_texts():
        trainer = Trainer(config)
    entry["made_in_s"] = time.perf_counter() - start
    entry["trained_parameters"] = planned.trainable
    highest: dict[str, int] = {}
    with ExitStack() as stack:
        stack.callback(trainer.folder.close)
        stack.enter_context(memory.following(trainer))
        for turn, kind in [(turn, kind) for turn in ("first", "second") for kind in KINDS]:
            expected = entry["updates"].get(kind, {}).get("seconds", FIRST_S)
            if expected > left():
                entry["skipped"].append(f"{turn} {kind} update: {left():.0f} s are left of the time limit")
                break
            begun = time.perf_counter()
            with by_phase(trainer, memory) as phases:
                record = trainer.step()
            whole = time.perf_counter() - begun  # a record has read the device's clock at its end
            for phase, peak in phases.items():
                highest[phase] = max(peak, highest.get(phase, 0))
            entry["memory"] = _memory(planned, highest, memory)
            if wrong := faults(record):
                raise RuntimeError(f"{turn} {kind} update: {', '.join(wrong)}")
            entry["updates"][kind] = {"measured": turn, **_speed(trainer, kind, record, whole, tflops)}
            write()


def _speed(trainer: Trainer, kind: updates.Kind, record: dict[str, Any], whole: float, tflops: float) -> dict[str, Any]:
    """Seconds by stage, pictures a second, and the share of the product; ``whole`` is the update's seconds."""
    method, seconds = trainer.config.method, record["seconds"]
    plan = updates.plan(kind, method, trainer.schedule)
    shape = flops.Shape.of(trainer.policy, TOKENS.get(trainer.policy.family, 0))
    operations = flops.learning(shape, trainer.schedule, plan, method.prompts * plan.sequences)
    reached = operations / (seconds["logp"] + seconds["backward"]) / 1e12
    return {
        "seconds": whole,
        "seconds_by_stage": seconds,
        "pictures": method.prompts * plan.pictures,
        "pictures_a_second": method.prompts * plan.pictures / whole,
        "tflop_of_forward_and_backward": operations / 1e12,
        "tflop_s": reached,
        "of_product": reached / tflops,
        "goal_of_product_met": reached / tflops >= OF_PRODUCT,
        "loss": record["loss"],
        "gradient_norm": record["gradient_norm"],
    }


def _memory(planned: Estimate, highest: dict[str, int], memory: Counter) -> dict[str, Any]:
    """The peak so far beside the plan's, whole, by phase, and the plan's items."""
    peak = max(highest.values())
    phases = {
        phase: {"gb": bytes_ / 1e9, "planned_gb": (planned.of("always") + planned.of(phase)) / 1e9}  # type: ignore
        for phase, bytes_ in highest.items()
        if phase != "between"
    }
    return {
        "peak_gb": peak / 1e9,
        "reserved_gb": None if memory.reserved is None else memory.reserved / 1e9,
        "of_plan": peak / planned.peak(),
        "goal_of_plan_met": abs(peak / planned.peak() - 1) <= OF_PLAN,
        "by_phase": phases,
        "between_gb": highest.get("between", 0) / 1e9,
        "plan": [{"what": item.name, "when": item.phase, "gb": item.bytes / 1e9} for item in planned.items],
    }


def _try(name: str, entry: dict[str, Any], small: bool, device: str, *rest: Any) -> str | None:
    """Measure one size; returns why it failed, if it did, and holds nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = config_of(name, device, Path(folder) / "run", small)
            entry["batches"] = {"micro_batch": config.run.micro_batch, "rollout_batch": config.run.rollout_batch}
            entry["sequences"] = {"prompts": config.method.prompts, "group": config.method.group}
            measure(config, entry, *rest)
        except Exception as error:  # the other sizes are still worth measuring
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


def main(words: list[str] | None = None) -> int:
    """Measure, print a line an update, and write the file; 1 if something failed or nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--machine", type=Path, help="the file that says what a bf16 product reaches here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="tiny models of the same families")
    parser.add_argument("--only", choices=list(SIZES), help="one size")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds in all")
    a = parser.parse_args(words)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no GPU; use cpu --small")
    start = time.perf_counter()
    logging.getLogger("varl").setLevel(logging.ERROR)
    if a.device == "cpu":
        keep_freed()
    tflops, source = product_of(a.machine, a.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if a.device == "cuda" else "cpu",
        "small": a.small,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "varl": varl.__version__},
        "product_bf16_tflop_s": tflops,
        "product_from": source,
        "goals": {"of_product_at_least": OF_PRODUCT, "of_plan_within": OF_PLAN},
        "counted": "operations of the method: what checkpointing computes again does not count",
        "sizes": {},
        "failed": [],
    }

    def write() -> None:
        result["seconds"] = time.perf_counter() - start
        partial = a.out.with_name(a.out.name + ".new")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, a.out)

    def left() -> float:
        return a.limit - (time.perf_counter() - start)

    a.out.parent.mkdir(parents=True, exist_ok=True)
    for name in [a.only] if a.only else list(SIZES):
        entry = result["sizes"][name] = {}
        if left() <= 0:
            entry["skipped"] = ["the time limit is over"]
        elif (why := _try(name, entry, a.small, a.device, write, left, tflops)) is not None:
            result["failed"].append(f"{name}: {why}")
        gc.collect()
        _say(name, entry)
        write()
    measured = any(entry.get("updates") for entry in result["sizes"].values())
    if not measured:
        result["failed"].append("nothing was measured")
        write()
    for line in result["failed"]:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if result["failed"] else 0


def _say(name: str, entry: dict[str, Any]) -> None:
    """A line an update, and one of memory."""
    for kind, found in entry.get("updates", {}).items():
        print(
            f"{name}, {kind} update ({found['measured']}): {found['seconds']:.2f} s, "
            f"{found['pictures_a_second']:.2f} pictures a second, {found['tflop_s']:.3g} TFLOP/s forward and backward, "
            f"{found['of_product']:.2f} of the product"
        )
    if memory := entry.get("memory"):
        print(f"{name}: peak {memory['peak_gb']:.3f} GB, {memory['of_plan']:.2f} of the plan's")
    for line in entry.get("skipped", []):
        print(f"{name}: skipped, {line}")


if __name__ == "__main__":
    sys.exit(main())
