"""Vanilla, prefix-only and full-method training of Inkling: a resumable queue of paired runs, and its report.

    python -m benchmarks.results run --seeds 5 --pictures 5120
    python -m benchmarks.results time
    python -m benchmarks.results report
    python -m benchmarks.results run --methods unguided early guided rescored --data benchmarks/data/savings
    python -m benchmarks.results run --methods fp32 bf16 --data benchmarks/data/precision
    python -m benchmarks.results run --methods drawn reused --data benchmarks/data/reuse
    python -m benchmarks.results run --methods guided-slow unguided-slow --data benchmarks/data/slow

Runs of one seed share prompts, their order, and the base model. Each is a plain ``varl train`` with overrides, so an
interrupted queue goes on where it was. Curves are held-out evaluations against the pictures scored in training.
Finished curves are kept as JSON beside this file, with what made them; the report reads those. ``time`` measures the
seconds of every kind of update with nothing else running, methods in turn, so that the seconds of the report do not
depend on what the machine did during the queue.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.curves import load, print_report, read_curve
from varl.models.inkling.checkpoint import PACKAGED
from varl.run.metrics import read_metrics

RECIPE = "recipes/inkling-ocr.yaml"
PROMPTS, GROUP = 4, 8
EVALUATE_EVERY = 512
"""Pictures between two evaluations."""
WARM = 2
"""Updates of a timing run that are left out: they load the reward and warm the caches."""
console = Console(width=140)


@dataclass(frozen=True)
class Method:
    """One way of training: its label, its overrides, and the pictures it scores in a cycle of updates."""

    label: str
    overrides: dict[str, object]
    pictures: int
    updates: int = 1

    def updates_for(self, pictures: int) -> int:
        return pictures * self.updates // self.pictures

    def evaluate_every(self, pictures: int) -> int:
        """Updates between evaluations, so that all methods are evaluated about every ``pictures`` pictures."""
        return max(1, round(pictures * self.updates / self.pictures))


ONE = PROMPTS * GROUP
CYCLE = ONE * (3 * 2 + 1)
"""Pictures of three prefix updates with two continuations, and a suffix update."""
TESTED_GUIDED: dict[str, object] = {"sampling.guidance": 0.0, "evaluation.sampling.guidance": 1.0}
GUIDED: dict[str, object] = {**TESTED_GUIDED, "sampling.guidance": 1.0}
EVERY_SECOND: dict[str, object] = {
    **TESTED_GUIDED,
    "method.middle": "grid:3",
    "method.group": 4,
    "method.continuations": 4,
    "method.prefix_updates": 1,
}
"""Suffix updates as often as prefix updates, with the 6x6 grid, which decides the most, in the suffix."""
SLOW: dict[str, object] = {"optimizer.learning_rate": 5e-5}
"""A quarter of the recipe's learning rate."""
PLAIN = {"method.mask.enabled": False, "method.alpha": 0.0}
METHODS = {
    "vanilla": Method("vanilla GRPO", {"method.update": "full", **PLAIN}, ONE),
    "prefix": Method(
        "prefix-only, terminal reward",
        {"method.update": "prefix", **PLAIN},
        ONE,
    ),
    "paper": Method(
        "full method, K = 2, alpha 0.6, 3 : 1",
        {
            "method.continuations": 2,
            "method.alpha": 0.6,
            "method.prefix_updates": 3,
            "method.suffix_updates": 1,
        },
        CYCLE,
        4,
    ),
    "full": Method("full method, the recipe", {}, ONE),
}
SAVINGS = {
    "unguided": Method("rollouts without guidance", TESTED_GUIDED, ONE),
    "early": Method("without guidance, valued on 6x6 pictures", {**TESTED_GUIDED, "method.value_at": "grid:6"}, ONE),
    "guided": Method("guided rollouts", GUIDED, ONE),
    "rescored": Method("guided, log-probabilities under guidance", {**GUIDED, "method.logp": "sampling"}, ONE),
    "fp32": Method("fp32 rollouts", TESTED_GUIDED, ONE),
    "bf16": Method("bf16 rollouts", {**TESTED_GUIDED, "policy.rollout_precision": "bfloat16"}, ONE),
    "drawn": Method("suffix updates draw their own", EVERY_SECOND, PROMPTS * 4 * (4 + 1), 2),
    "reused": Method("suffix updates reuse", {**EVERY_SECOND, "method.suffix_state": "reused"}, PROMPTS * 4 * 4, 2),
    "guided-slow": Method("guided rollouts, a quarter of the rate", {**GUIDED, **SLOW}, ONE),
    "unguided-slow": Method("without guidance, a quarter of the rate", {**TESTED_GUIDED, **SLOW}, ONE),
}
"""What the savings of docs/performance.md do to learning, all evaluated with guidance."""
ALL = METHODS | SAVINGS


def folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of a method and a seed lies."""
    return out / f"{name}-{seed}"


def command(path: Path, name: str, seed: int, updates: int, evaluate_every: int, extra: list[str]) -> list[str]:
    """The ``varl train`` that makes one run."""
    settings = {
        "run.out": path,
        "run.seed": seed,
        "prompts.seed": seed,
        "run.updates": updates,
        "run.threads": 1,
        "run.gallery_every": 0,
        "run.diagnose_every": 0,
        "reward": '{"name": "ocr", "engine": {"threads": 1}}',
        "evaluation.enabled": evaluate_every > 0,
        "evaluation.every": evaluate_every,
        "evaluation.count": 96,
        **ALL[name].overrides,
    }
    return [sys.executable, "-m", "varl", "train", RECIPE, *(f"--{k}={v}" for k, v in settings.items()), *extra]


def run(out: Path, data: Path, seeds: int, pictures: int, names: list[str], workers: int, extra: list[str]) -> None:
    """Work through the queue, all methods of a seed before the next seed; finished curves are kept in ``data``."""
    queue = [(name, seed) for seed in range(seeds) for name in names]
    out.mkdir(parents=True, exist_ok=True)

    def work(job: tuple[str, int]) -> None:
        name, seed = job
        kept, method, path = data / f"{name}-{seed}.json", ALL[name], folder(out, name, seed)
        if kept.exists():
            return
        updates, every = method.updates_for(pictures), method.evaluate_every(EVALUATE_EVERY)
        with (out / f"{name}-{seed}.log").open("a") as log:
            code = subprocess.run(command(path, name, seed, updates, every, extra), stdout=log, stderr=log).returncode
        if code == 0:
            data.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(record(path, pictures, extra), indent=1))
        console.print(f"{name} seed {seed}: {'done' if code == 0 else f'FAILED, see {log.name}'}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, queue))


def record(path: Path, pictures: int, extra: list[str]) -> dict[str, object]:
    """A finished run as plain values: its curve and what made it."""
    curve = read_curve(path)
    made_by = json.loads(sorted((path / "evaluations").glob("update-*.json"))[0].read_text())["made_by"]
    return {
        "pictures": curve.pictures.tolist(),
        "updates": curve.updates,
        "accuracy": curve.accuracy.tolist(),
        "budget": pictures,
        "overrides": extra,
        "base": hashlib.sha256(PACKAGED.read_bytes()).hexdigest()[:16],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "made_by": made_by,
    }


def measure_seconds(out: Path, names: list[str], updates: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of an update of each kind, one thread, the methods taking turns."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    for turn in range(rounds):
        for name in names:
            path = out / f"time-{name}"
            shutil.rmtree(path, ignore_errors=True)
            subprocess.run(command(path, name, turn, updates + WARM, 0, []), check=True, capture_output=True)
            for entry in read_metrics(path)[WARM:]:
                found[name][entry["kind"]].append(sum(entry["seconds"].values()))
    return {name: {kind: statistics.median(s) for kind, s in kinds.items()} for name, kinds in found.items()}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "time", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=5120, help="pictures scored in every run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(ALL))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/results.png"))
    a, extra = parser.parse_known_args()
    seconds = a.data / "seconds.json"
    if a.action == "run":
        run(a.out, a.data, a.seeds, a.pictures, a.methods, a.workers, extra)
    elif a.action == "time":
        a.data.mkdir(parents=True, exist_ok=True)
        each = measure_seconds(a.out, a.methods, updates=9, rounds=3)
        seconds.write_text(json.dumps(each, indent=1))
        console.print(each)
    else:
        each = json.loads(seconds.read_text()) if seconds.exists() else {}
        labels = {name: method.label for name, method in ALL.items()}
        print_report(load(a.data, a.methods), each, labels, a.figure, console)


if __name__ == "__main__":
    main()
