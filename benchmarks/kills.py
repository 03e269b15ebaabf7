"""Kills a training run by ``kill -9`` at random moments, again and again: ``python -m benchmarks.kills``.

    python -m benchmarks.kills --processes 2        # of torchrun: one of them, torchrun alone, or all; ddp, then fsdp2

Every time the same command is given again, until the run is finished; then all it left must be, to the byte, what a run
leaves that was never killed, timings apart. The run is small and does everything: both kinds of update, evaluations,
checkpoints every other update, a reward with randomness of its own. Then what checkpoints cost is measured: of the
embedded model with its reference and optimizer, and of a gigabyte of tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.group import VICTIMS, Group
from varl.cli import main as command_line
from varl.models import load_policy
from varl.policy import Prompt
from varl.run.checkpoint import Checkpoints
from varl.run.metrics import read_metrics

__all__ = ["begin", "noisy_brightness", "outcome", "recipe", "sweep"]

RECIPE = """
policy: {{weights: random, config: {{grids: [1, 2, 3, 6], codes: 32, decoder: 8, width: 32, depth: 2, heads: 2}}}}
prompts: {{count: 7}}
reward: "benchmarks.kills:noisy_brightness"
method: {{prompts: 2, group: 4, continuations: 2, middle: "grid:3", prefix_updates: 2}}
optimizer: {{learning_rate: 1.0e-3, warmup_updates: 3}}
evaluation: {{count: 4, every: 4}}
run: {{out: {out}, updates: {updates}, save_every: 2, keep: 2, device: cpu, threads: 1, gallery_every: 0}}
"""
OWN_TO_A_START = {"metrics.jsonl", "starts.jsonl", "config.yaml", "lock", "manifest.json"}


def noisy_brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Mean of the left half less that of the right, with noise from torch's global generator; [B]."""
    half = images.shape[-1] // 2
    difference = images[..., :half].mean((1, 2, 3)) - images[..., half:].mean((1, 2, 3))
    return 20 * difference + 0.1 * torch.rand(len(images))


def recipe(folder: Path, updates: int, mode: str = "ddp") -> Path:
    """Write the recipe of a run in ``folder / "run"``."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "run", updates=updates) + f"parallel: {{mode: {mode}}}\n")
    return path


def begin(path: Path, processes: int = 1) -> ForkServerProcess | Group:
    """Give the command ``varl train`` of a recipe, in a process of its own; its exit code is the command's."""
    if processes > 1:
        return Group(path, processes)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["varl.cli", "varl.trainer"])
    process = context.Process(target=_command, args=(str(path),))
    process.start()
    return process


def _command(path: str) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        sys.exit(command_line(["train", path]))


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run left: metrics without seconds, the checkpoints' values, and a hash of every file's bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in OWN_TO_A_START)
    paths = [path for path in paths if "tensorboard" not in path.parts]
    files = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(folder)]
    values = [json.loads(path.read_text())["values"] for path in sorted(folder.rglob("manifest.json"))]
    return {"files": files, "metrics": lines, "values": values}


def sweep(
    folder: Path, kills: int, updates: int, seed: int = 0, processes: int = 1, mode: str = "ddp"
) -> dict[str, Any]:
    """Kill runs until ``kills`` kills have hit one, and compare each that is finished with one never killed.

    Args:
        processes: of each run; several are started by torchrun.
        mode: ``parallel.mode``.

    Returns:
        Numbers: kills, those that left a checkpoint or file half written, runs finished, runs that differ, and whom the
        kills hit if there are several processes; and seconds: of a run never killed, and on average of the work that a
        kill lost, since the newest checkpoint or the start.
    """
    rng = random.Random(seed)
    for name in ("whole", "again"):
        (folder / name).mkdir(parents=True)
        started = time.perf_counter()
        _finished(begin(recipe(folder / name, updates, mode), processes))
        seconds = time.perf_counter() - started  # the first one also waits for the fork server to import torch
    expected = outcome(folder / "whole" / "run")
    if outcome(folder / "again" / "run") != expected:
        raise RuntimeError("two runs that nobody killed differ")
    # Several processes spend about half of a short run on their start.
    moments = (0.0, 0.5) if processes == 1 else (0.4, 1.0)
    found = {"kills": 0, "half_written": 0, "finished": 0, "different": 0}
    lost = 0.0
    while found["kills"] < kills:
        own = folder / f"run-{found['finished']}"
        own.mkdir()
        path = recipe(own, updates, mode)
        for _ in range(kills - found["kills"]):
            process, began = begin(path, processes), time.time()
            process.join(rng.uniform(*moments) * seconds)
            if process.exitcode is not None:
                break
            if hit := _kill(process, rng):
                found[hit] = found.get(hit, 0) + 1
            saved = [checkpoint.stat().st_mtime for checkpoint in own.glob("run/checkpoints/update-*")]
            lost += time.time() - max([began, *saved])
            found["kills"] += 1
            found["half_written"] += any(own.rglob("partial.*"))
        _finished(process if process.exitcode == 0 else begin(path, processes))
        found["finished"] += 1
        found["different"] += outcome(own / "run") != expected
    return {**found, "seconds_whole": round(seconds, 2), "seconds_lost_a_kill": round(lost / kills, 2)}


def _kill(process: ForkServerProcess | Group, rng: random.Random) -> str:
    """Kill, and wait for the end; returns who of several processes it was."""
    if isinstance(process, Group):
        return process.kill(rng.choice(VICTIMS), rng.randrange(2**16))
    process.kill()
    process.join()
    return ""


def costs(folder: Path, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Size of a checkpoint, and seconds: that the run waits, until it is on the disk, and to check and load it."""
    checkpoints, started = Checkpoints(folder, 1), time.perf_counter()
    checkpoints.save(1, tensors, {}, None)
    waited = time.perf_counter() - started
    checkpoints.wait()
    written = time.perf_counter() - started
    started = time.perf_counter()
    found = Checkpoints(folder, 1).latest()
    assert found is not None
    found.load({name: torch.zeros_like(value) for name, value in tensors.items()})
    loaded = time.perf_counter() - started
    size = sum(path.stat().st_size for path in found.path.iterdir())
    seconds = {"seconds_waited": waited, "seconds_written": written, "seconds_resumed": loaded}
    return {"megabytes": round(size / 1e6, 1), **{name: round(value, 3) for name, value in seconds.items()}}


def _checkpoints() -> dict[str, dict[str, Tensor]]:
    weights = load_policy("inkling").trainable.state_dict()
    parts = ("policy", "reference", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    inkling = {f"{part}.{name}": value.clone() for part in parts for name, value in weights.items()}
    return {"inkling": inkling, "gigabyte": {f"tensor.{i}": torch.rand(25_000_000) for i in range(10)}}


def _finished(process: ForkServerProcess | Group) -> None:
    process.join()
    if process.exitcode != 0:
        said = process.log.read_text()[-4000:] if isinstance(process, Group) else ""
        raise RuntimeError(f"the run ended with exit code {process.exitcode} {said}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--updates", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="of each run; several are started by torchrun")
    options = parser.parse_args()
    several, different = options.processes > 1, 0
    for mode in ("ddp", "fsdp2") if several else ("ddp",):
        with tempfile.TemporaryDirectory() as folder:
            found = sweep(Path(folder), options.kills, options.updates, options.seed, options.processes, mode)
        print(*[f"{options.processes} processes, {mode}"] * several, json.dumps(found, indent=1), flush=True)
        different += found["different"]
    for name, tensors in {} if several else _checkpoints().items():
        with tempfile.TemporaryDirectory() as folder:
            print(name, json.dumps(costs(Path(folder), tensors)))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
