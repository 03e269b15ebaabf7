"""The demo's recipe from start to end on this machine: does it learn, and where does its time go?

python3 -m tools.gpu.train --device cuda --out day

Writes ``3-train.json`` every few seconds while the run goes on, so that a time limit leaves what is known by then, and
at the end the pictures before and after, ``before_after.png``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from benchmarks.stages import SKIPPED, medians

import varl
from varl.run.metrics import read_metrics

__all__ = ["command", "faults", "main", "summary"]

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/inkling-ocr.yaml"
LIMIT_S = 112.0
EVERY_S = 5.0
"""Seconds between two looks at the run that are written down."""
MOST_THREADS = 16
ENDING_S = 5.0
"""Seconds that a run which is told to stop has for that."""
SMALL = (
    *("--run.updates", "4", "--method.prefix_updates", "1", "--method.prompts", "2", "--method.group", "4"),
    *("--run.micro_batch", "8", "--evaluation.count", "6"),
)


def command(device: str, run: Path, small: bool) -> list[str]:
    """The command of the run: the recipe, with as many threads of OCR as there are cores, which changes no number."""
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    own = ("--run.device", device, "--run.out", str(run), "--reward.engine.threads", str(threads))
    return [sys.executable, "-m", "varl", "train", RECIPE, *own, *(SMALL if small else ())]


def summary(run: Path) -> dict[str, Any]:
    """What a run's folder says, at any time: updates, seconds by stage, pictures, evaluations, failures."""
    found: dict[str, Any] = {"updates": 0, "asked_updates": None, "evaluations": []}
    if (run / "config.yaml").is_file():
        found["asked_updates"] = yaml.safe_load((run / "config.yaml").read_text())["config"]["run"]["updates"]
    if (run / "starts.jsonl").is_file():
        start = json.loads((run / "starts.jsonl").read_text().splitlines()[0])
        found |= {name: start[name] for name in ("versions", "hardware") if name in start}
    for path in sorted(run.glob("evaluations/*.json")):
        content = json.loads(path.read_text())
        found["evaluations"].append({name: content[name] for name in ("update", "metrics", "failed", "alarm")})
    if not (run / "metrics.jsonl").is_file() or not (records := read_metrics(run)):
        return found
    settled = records[SKIPPED:] if len(records) > 2 * SKIPPED else records
    seconds = [sum(record["seconds"].values()) for record in records]
    stages = {stage for record in records for stage in record["seconds"]}
    return found | {
        "updates": len(records),
        "pictures": records[-1]["pictures"],
        "pictures_a_second": records[-1]["pictures"] / sum(seconds),
        "median_seconds_by_stage": medians(settled),
        "seconds_of_updates": sum(seconds),
        "seconds_of_stages": {name: sum(r["seconds"].get(name, 0.0) for r in records) for name in sorted(stages)},
        "failed_pictures": sum(record["failed_pictures"] for record in records),
        "steps_not_taken": sum(record["skipped"] for record in records),
        "not_finite": [r["update"] for r in records if not _finite(r["loss"]) or not _finite(r["gradient_norm"])],
    }


def _finite(value: float | None) -> bool:
    """Whether a number of the metrics is one; there None stands for those that are not finite."""
    return value is not None and math.isfinite(value)


def faults(found: dict[str, Any], code: int | None, small: bool) -> list[str]:
    """Why a run does not prove what it should; empty if it does.

    Args:
        found: its ``summary``.
        code: its exit code; None if it was stopped at the time limit.
        small: whether it was too short to learn.
    """
    wrong = []
    if code is None:
        wrong.append("the time limit came before the end")
    elif code:
        wrong.append(f"varl train ended with code {code}")
    if found["updates"] != found["asked_updates"]:
        wrong.append(f"{found['updates']} updates were made of {found['asked_updates']}")
    failed = found.get("failed_pictures", 0) + sum(e["failed"] for e in found["evaluations"])
    if failed:
        wrong.append(f"{failed} pictures could not be scored")
    if found.get("not_finite"):
        wrong.append(f"numbers of update {found['not_finite'][0]} are not finite")
    if len(found["evaluations"]) < 2:
        return [*wrong, f"there are {len(found['evaluations'])} held-out evaluations, not 2"]
    before, after = (found["evaluations"][i]["metrics"]["word_accuracy"]["value"] for i in (0, -1))
    if not small and after <= before:
        wrong.append(
            f"the held-out word accuracy was {before:.3f} before and is {after:.3f} after: nothing was learned"
        )
    return wrong


def main(words: list[str] | None = None) -> int:
    """Run, write and judge; 1 if the run does not prove what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--small", action="store_true", help="four small updates, which prove that all works")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds until the run is stopped")
    a = parser.parse_args(words)
    logging.getLogger("varl").setLevel(logging.ERROR)
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "3-train.json"
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        asked = command(a.device, run, a.small)
        result: dict[str, Any] = {"command": " ".join(["varl", *asked[3:]]), "small": a.small, "finished": False}
        code = _watch(asked, run, log, file, result, a.limit)
        found = summary(run)
        result |= found | {"finished": code == 0, "failed": faults(found, code, a.small)}
        picture = run / "before_after.png"
        if picture.is_file():
            shutil.copy(picture, a.out / "before_after.png")
        elif not result["failed"]:
            result["failed"].append("there is no picture before and after")
        if result["failed"]:
            result["log"] = log.read_text(errors="replace").splitlines()[-30:]
    _write(file, result)
    _say(result)
    return 1 if result["failed"] else 0


def _watch(asked: list[str], run: Path, log: Path, file: Path, result: dict[str, Any], limit: float) -> int | None:
    """Run a command to its end or the limit, and write down on the way what there is; ``result`` gets the times.

    Returns:
        Its exit code; None if it was stopped.
    """
    paths = os.pathsep.join([str(Path(varl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    signs = {"first evaluation": "evaluations/*.json", "first update": "metrics.jsonl", "weights": "weights.*"}
    reached: dict[str, float] = {}
    result["reached_after_s"] = reached
    start = written = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(asked, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, stdout=out, stderr=out)
        while process.poll() is None and (now := time.perf_counter()) - start < limit:
            for name, pattern in signs.items():
                if name not in reached and any(path.stat().st_size for path in run.glob(pattern)):
                    reached[name] = now - start
            if now - written >= EVERY_S:
                with suppress(OSError, ValueError, KeyError, IndexError):  # a file may be half written
                    _write(file, result | summary(run) | {"seconds": now - start})
                written = now
            time.sleep(0.1)
        code = process.poll()
        if code is None:
            process.terminate()
            try:
                process.wait(ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    result["seconds"] = time.perf_counter() - start
    return code


def _write(file: Path, result: dict[str, Any]) -> None:
    partial = file.with_name(file.name + ".new")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, file)


def _say(result: dict[str, Any]) -> None:
    for each in result["evaluations"]:
        words = each["metrics"]["word_accuracy"]
        between = f"{words['low']:.3f} to {words['high']:.3f}"
        print(f"after {each['update']} updates: word accuracy {words['value']:.3f} ({between})")
    print(f"{result['updates']} updates, {result['seconds']:.0f} s in all")
    for kind, stages in result.get("median_seconds_by_stage", {}).items():
        print(f"{kind}: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in stages.items()))
    for line in result["failed"]:
        print(f"FAILED {line}", file=sys.stderr)
    for line in result.get("log", []):
        print(f"  {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
