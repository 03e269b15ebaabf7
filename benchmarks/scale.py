"""How training scales over processes: measured on this machine, counted for large models.

    python -m benchmarks.scale                      # all three parts
    python -m benchmarks.scale --part throughput --rounds 5

- throughput: whole updates of Inkling (a cheap stand-in reward) by one process and by two, one thread each;
- flips: the share of fp32 draws that rounding changes when two processes draw what one would, in other batches;
- communication: bytes that an update sends at VAR d30 and Infinity-2B on 8 and 64 GPUs, from ``communication.py``, and
  what scaling follows on paper from a GPU's speed and its links.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.communication import policy_on_meta, sent, size_of, work
from varl import load_policy, updates
from varl.config import (
    EvaluationConfig,
    MethodConfig,
    ParallelConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.policy import Prompt
from varl.prompts import resolve_prompts
from varl.rewards import RewardOutput
from varl.sampling import Sampling
from varl.trainer import Trainer

METHOD = MethodConfig(prompts=4, group=8, middle="grid:6")
GPUS = (8, 64)
FLOPS, NODE, BETWEEN = 400e12, 300e9, 45e9
"""Of a GPU: operations a second that training reaches, bytes a second to others of its machine of 8, and to others."""
console = Console(width=132)


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    """A reward that costs nothing."""
    return RewardOutput.from_scores(images.mean((1, 2, 3)), len(prompts))


def worker(mode: str, updates_: int, out: Path) -> None:
    """Seconds of each update, by kind, written by the main process."""
    config = TrainConfig(
        prompts=PromptConfig(count=64),
        reward="benchmarks.scale:brightness",
        method=METHOD,
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(out=out, device="cpu", threads=1, micro_batch=8, gallery_every=0, diagnose_every=0),
        parallel=ParallelConfig(cast(Any, mode)),
    )
    trainer, seconds = Trainer(config), []
    for _ in range(updates_):
        start = time.perf_counter()
        kind = trainer.step()["kind"]
        seconds.append((kind, time.perf_counter() - start))
    if trainer.distributed.main:
        (out / "seconds.json").write_text(json.dumps(seconds))


def throughput(rounds: int, updates_: int) -> dict[str, Any]:
    """Median seconds of an update by one process and by two, the arms in turn; the first updates are not counted."""
    arms = {"1 process": (1, "ddp"), "2, ddp": (2, "ddp"), "2, fsdp2": (2, "fsdp2")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (size, mode) in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                words = ["--worker", mode, "--updates", str(updates_), "--out", folder]
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
                subprocess.run(
                    [sys.executable, *launch, "-m", "benchmarks.scale", *words],
                    check=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                )
                lines = json.loads((Path(folder) / "seconds.json").read_text())[METHOD.prefix_updates + 1 :]
            kinds = {kind: [s for k, s in lines if k == kind] for kind in ("prefix", "suffix")}
            found[name].append({kind: statistics.median(values) for kind, values in kinds.items()})
    table = Table("processes", "kind", "seconds an update", "spread", "speed-up", title="Inkling, one thread a process")
    result: dict[str, Any] = {}
    for name, runs in found.items():
        for kind in ("prefix", "suffix"):
            values = [run[kind] for run in runs]
            ratios = [one[kind] / run[kind] for one, run in zip(found["1 process"], runs, strict=True)]
            result[f"{name}, {kind}"] = {"seconds": values, "speed-up": ratios}
            spread = f"{min(values):.3f} to {max(values):.3f}"
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            table.add_row(name, kind, f"{statistics.median(values):.3f}", spread, ratio)
    console.print(table)
    return result


def count_flips(differ: Tensor, tails: int, prefix: int) -> tuple[int, int]:
    """Draws, and those among them that flipped; after its first flip a sequence is another one and not compared.

    Args:
        differ: bool [sequences, tokens], where two draws of the same sequences differ.
        tails: adjacent sequences that go on from one prefix, whose tokens are drawn once.
        prefix: tokens of it.
    """
    tokens = differ.shape[1]
    first = torch.where(differ.any(1), differ.int().argmax(1), tokens)
    heads, rest = first[::tails], first[first >= prefix]
    draws = (heads + 1).clamp(max=prefix).sum() + ((rest + 1).clamp(max=tokens) - prefix).sum()
    return int(draws), int((heads < prefix).sum() + (rest < tokens).sum())


def flips(batches: int) -> dict[str, Any]:
    """Draw updates as one process and as two would, and count the first differing draw of every sequence."""
    policy = load_policy("inkling")
    schedule = policy.default_schedule
    prompts = resolve_prompts("inkling:train", count=METHOD.prompts * batches)
    table = Table("update", "draws", "flipped", "share", title="draws that rounding flips in fp32")
    result = {}
    for kind in ("full", "prefix", "suffix"):
        made = updates.plan(cast(updates.Kind, kind), METHOD, schedule)
        rows, draws, flipped = METHOD.prompts * made.sequences, 0, 0
        for batch in range(batches):
            condition = policy.condition(prompts[batch * METHOD.prompts : (batch + 1) * METHOD.prompts])
            halves = (range(rows), range(rows // 2), range(rows // 2, rows))
            whole, first, second = (
                updates.draw(policy, condition, made, Sampling(), (0, batch), trained=half).whole.actions
                for half in halves
            )
            found = count_flips(
                torch.cat([first, second]) != whole, made.tails, schedule.span(range(made.branch_at)).stop
            )
            draws, flipped = draws + found[0], flipped + found[1]
        result[kind] = {"draws": draws, "flipped": flipped}
        table.add_row(kind, f"{draws:,}", str(flipped), f"{flipped / draws:.1e}")
    console.print(table)
    return result


LARGE = {"VAR d30": ("var", {"size": "d30"}, "grid:8"), "Infinity-2B": ("infinity", {"size": "2b"}, "quarter")}
"""Family, its settings and the middle step, with 16 prompts of 16 sequences, all weights trained."""
MODES = {
    "ddp": ParallelConfig(),
    "fsdp2": ParallelConfig("fsdp2"),
    "fsdp2, bf16": ParallelConfig("fsdp2", "bfloat16"),
}


def communication(flops: float, node: float, between: float) -> dict[str, Any]:
    """Bytes of an update, and the seconds that they and the arithmetic take on paper."""
    columns = ("model", "GPUs", "mode", "kind", "draw", "learn", "refer.", "red.-sc.", "all-red.", "a GPU")
    table = Table(
        *columns, "compute", "send", "efficiency", title="an update: GB of each collective as a whole, seconds"
    )
    result = {}
    for (name, (family, shape, middle)), gpus, (label, parallel), kind in product(
        LARGE.items(), GPUS, MODES.items(), ("prefix", "suffix")
    ):
        config = TrainConfig(
            policy=PolicyConfig(family, config=shape, precision="bfloat16"),
            method=MethodConfig(prompts=16, group=16, middle=cast(Any, middle)),
            run=RunConfig(micro_batch=4),
            parallel=parallel,
        )
        policy = policy_on_meta(config)
        size, schedule = size_of(policy), policy.default_schedule
        found = sent(config, cast(updates.Kind, kind), size, schedule, gpus)
        done = work(config, cast(updates.Kind, kind), size, schedule)
        computing = (done.draw + done.learn) / gpus / flops
        sending = found.per_process(gpus) / (node if gpus <= 8 else between)
        # From nothing overlapping to, in fsdp2, everything; ddp sums when all is computed.
        efficiency = [computing / (computing + sending)]
        if parallel.mode == "fsdp2":
            efficiency.append(min(1.0, computing / sending))
        parts = asdict(found)
        shown = [f"{part / 1e9:.1f}" if part else "" for part in (*parts.values(), found.per_process(gpus))]
        share = " to ".join(f"{value:.0%}" for value in efficiency)
        table.add_row(name, str(gpus), label, kind, *shown, f"{computing:.2f}", f"{sending:.2f}", share)
        result[f"{name}, {gpus} GPUs, {label}, {kind}"] = {
            "bytes": parts,
            "bytes_per_gpu": found.per_process(gpus),
            "compute_s": computing,
            "send_s": sending,
        }
    console.print(table)
    console.print(
        f"On paper: {flops / 1e12:.0f} TFLOP/s a GPU, {node / 1e9:.0f} GB/s inside a machine of 8, "
        f"{between / 1e9:.0f} GB/s beyond. Decoding and rewards of the GPU's own pictures are left out."
    )
    return result


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("throughput", "flips", "communication"), help="by default all")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput's arms")
    parser.add_argument("--updates", type=int, default=12, help="in each arm of a round")
    parser.add_argument("--batches", type=int, default=16, help="updates that are drawn twice to count flips")
    parser.add_argument("--flops", type=float, default=FLOPS, help="operations a second that a GPU reaches")
    parser.add_argument("--node", type=float, default=NODE, help="bytes a second of a GPU inside its machine")
    parser.add_argument("--between", type=float, default=BETWEEN, help="bytes a second of a GPU to other machines")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(a.worker, a.updates, a.out)
    parts = {
        "throughput": lambda: throughput(a.rounds, a.updates),
        "flips": lambda: flips(a.batches),
        "communication": lambda: communication(a.flops, a.node, a.between),
    }
    found = {name: run() for name, run in parts.items() if a.part in (None, name)}
    if a.out is not None:
        a.out.write_text(json.dumps({"torch": str(torch.__version__), **found}, indent=1))


if __name__ == "__main__":
    main()
