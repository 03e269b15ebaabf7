"""Vanilla, prefix-only and full-method training of Inkling: a resumable queue of paired runs, and its report.

    python -m benchmarks.results run --seeds 5 --pictures 4096
    python -m benchmarks.results report

Runs of one seed share prompts, their order, and the base model. Each is a plain ``varl train`` with overrides, so an
interrupted queue goes on where it was. Curves are held-out evaluations against the pictures scored in training, and
against the seconds of training (evaluations not counted). Finished curves are kept as JSON beside this file, with what
made them; the report reads those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from varl.models.inkling.checkpoint import PACKAGED

RECIPE = "recipes/inkling-ocr.yaml"
PROMPTS, GROUP = 4, 8
console = Console()


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
PLAIN = {"method.mask.enabled": False, "method.alpha": 0.0}
PAPER = {"method.alpha": 0.6, "method.prefix_updates": 3, "method.suffix_updates": 1}
METHODS = {
    "vanilla": Method("vanilla GRPO", {"method.update": "full", **PLAIN}, ONE),
    "prefix": Method("prefix-only GRPO", {"method.update": "prefix", "method.continuations": 1, **PLAIN}, ONE),
    "full": Method("full method, K = 1", {"method.continuations": 1, **PAPER}, ONE),
    "full-k2": Method("full method, K = 2", {"method.continuations": 2, **PAPER}, ONE * (3 * 2 + 1), 4),
}


def folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of a method and a seed lies."""
    return out / f"{name}-{seed}"


def command(out: Path, name: str, seed: int, pictures: int, extra: list[str]) -> list[str]:
    """The ``varl train`` that makes one run."""
    method = METHODS[name]
    settings = {
        "run.out": folder(out, name, seed),
        "run.seed": seed,
        "prompts.seed": seed,
        "run.updates": method.updates_for(pictures),
        "run.threads": 1,
        "run.gallery_every": 0,
        "run.diagnose_every": 0,
        "reward": '{"name": "ocr", "engine": {"threads": 1}}',
        "evaluation.every": method.evaluate_every(512),
        "evaluation.count": 96,
        "optimizer.learning_rate": 1e-4,
        **method.overrides,
    }
    return [sys.executable, "-m", "varl", "train", RECIPE, *(f"--{k}={v}" for k, v in settings.items()), *extra]


def run(out: Path, data: Path, seeds: int, pictures: int, names: list[str], workers: int, extra: list[str]) -> None:
    """Work through the queue, all methods of a seed before the next seed; finished curves are kept in ``data``."""
    queue = [(name, seed) for seed in range(seeds) for name in names]
    out.mkdir(parents=True, exist_ok=True)

    def work(job: tuple[str, int]) -> None:
        name, seed = job
        kept = data / f"{name}-{seed}.json"
        if kept.exists():
            return
        with (out / f"{name}-{seed}.log").open("a") as log:
            code = subprocess.run(command(out, name, seed, pictures, extra), stdout=log, stderr=log).returncode
        if code == 0:
            data.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(record(folder(out, name, seed), pictures, workers, extra), indent=1))
        console.print(f"{name} seed {seed}: {'done' if code == 0 else f'FAILED, see {log.name}'}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, queue))


def record(path: Path, pictures: int, workers: int, extra: list[str]) -> dict[str, object]:
    """A finished run as plain values: its curve and what made it."""
    curve = read_curve(path)
    made_by = json.loads(sorted((path / "evaluations").glob("update-*.json"))[0].read_text())["made_by"]
    return {
        **{name: values.tolist() for name, values in vars(curve).items()},
        "budget": pictures,
        "runs_at_a_time": workers,
        "overrides": extra,
        "base": hashlib.sha256(PACKAGED.read_bytes()).hexdigest()[:16],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "made_by": made_by,
    }


@dataclass(frozen=True)
class Curve:
    """Held-out word accuracy of one run against pictures and seconds of training."""

    pictures: np.ndarray
    seconds: np.ndarray
    accuracy: np.ndarray


def read_curve(path: Path) -> Curve:
    """The curve of a run folder."""
    seconds = {0: 0.0}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds[record["update"]] = seconds[record["update"] - 1] + sum(record["seconds"].values())
    points = [json.loads(file.read_text()) for file in sorted((path / "evaluations").glob("update-*.json"))]
    return Curve(
        np.array([p["training_pictures"] for p in points]),
        np.array([seconds[p["update"]] for p in points]),
        np.array([p["metrics"]["word_accuracy"]["value"] for p in points]),
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over runs and the half width of its 95% interval (Student's t)."""
    t = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
    n = len(values)
    half = t.get(n - 1, 1.96) * values.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(values.mean()), float(half)


def reaching(x: np.ndarray, accuracy: np.ndarray, level: float) -> float:
    """The first x at which a curve, interpolated, reaches a level; infinity if it does not."""
    above = np.flatnonzero(accuracy >= level)
    if len(above) == 0:
        return float("inf")
    i = above[0]
    if i == 0:
        return float(x[0])
    share = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def final_level(curve: Curve) -> float:
    """Mean of the last three evaluations."""
    return float(curve.accuracy[-3:].mean())


def load(data: Path) -> dict[str, list[Curve]]:
    """The finished curves of every method, by seed; only seeds that every method has.

    Raises:
        SystemExit: if there is none, or they were not made from one base and budget.
    """
    found: dict[str, dict[int, dict]] = {}
    for name in METHODS:
        runs = {int(p.stem.rsplit("-", 1)[1]): json.loads(p.read_text()) for p in data.glob(f"{name}-[0-9]*.json")}
        if runs:
            found[name] = runs
    if not found:
        raise SystemExit(f"no finished run in {data}; start with: python -m benchmarks.results run")
    if len({(r["base"], r["budget"]) for runs in found.values() for r in runs.values()}) > 1:
        raise SystemExit(f"the runs in {data} differ in base or budget; remove those that do not belong")
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    return {
        name: [Curve(*(np.array(runs[s][key]) for key in ("pictures", "seconds", "accuracy"))) for s in seeds]
        for name, runs in found.items()
    }


def show(value: float, half: float, digits: int) -> str:
    """A mean with its half width, where there is one."""
    if not np.isfinite(value):
        return "not reached"
    return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def report(data: Path, figure: Path) -> None:
    """Print the table and save the figure."""
    curves = load(data)
    seeds = len(next(iter(curves.values())))
    table = Table(title=f"Inkling, {seeds} paired seeds, mean ± 95% interval")
    for column in (
        "method",
        "base",
        "final",
        "rise",
        "relative",
        "pictures to 0.6",
        "to 0.7",
        "seconds to 0.6",
        "to 0.7",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, runs in curves.items():
        base, final = np.array([c.accuracy[0] for c in runs]), np.array([final_level(c) for c in runs])
        cells = [show(*interval(base), 3), show(*interval(final), 3), show(*interval(final - base), 3)]
        cells.append(f"{(final.mean() / base.mean() - 1):+.1%}")
        for attribute in ("pictures", "seconds"):
            for level in (0.6, 0.7):
                cells.append(
                    show(*interval(np.array([reaching(getattr(c, attribute), c.accuracy, level) for c in runs])), 0)
                )
        table.add_row(METHODS[name].label, *cells)
    Console(width=160).print(table)
    if "full" in curves:
        for name in curves.keys() - {"full"}:
            gain = np.array(
                [final_level(a) - final_level(b) for a, b in zip(curves["full"], curves[name], strict=True)]
            )
            console.print(f"full method - {METHODS[name].label}, final level, paired: {show(*interval(gain), 3)}")
    plot(curves, figure)
    console.print(f"figure: {figure}")


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Held-out word accuracy against pictures and against seconds, mean and 95% interval over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, attribute in zip(figure.subplots(1, 2, sharey=True), ("pictures", "seconds"), strict=True):
        for color, (name, runs) in zip(
            ("tab:gray", "tab:orange", "tab:blue", "tab:green"), curves.items(), strict=False
        ):
            end = min(getattr(c, attribute)[-1] for c in runs)
            x = np.linspace(0, end, 60)
            y = np.stack([np.interp(x, getattr(c, attribute), c.accuracy) for c in runs])
            centre = y.mean(0)
            axes.plot(x, centre, color=color, label=METHODS[name].label)
            if len(runs) > 1:
                half = np.array([interval(column)[1] for column in y.T])
                axes.fill_between(x, centre - half, centre + half, color=color, alpha=0.2)
        axes.set_xlabel("pictures scored in training" if attribute == "pictures" else "seconds of training")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out word accuracy")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=4096, help="pictures scored in every run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/results.png"))
    arguments, extra = parser.parse_known_args()
    if arguments.action == "run":
        a = arguments
        run(a.out, a.data, a.seeds, a.pictures, a.methods, a.workers, extra)
    else:
        report(arguments.data, arguments.figure)


if __name__ == "__main__":
    main()
