"""Seconds of an update by stage, from the metrics of a run.

python -m benchmarks.stages runs/inkling-ocr
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from varl.run.metrics import read_metrics

__all__ = ["SKIPPED", "medians", "stage_table"]

SKIPPED = 2
"""First updates of a run that are left out: they load the reward and warm the caches."""


def medians(records: list[dict]) -> dict[str, dict[str, float]]:
    """Median seconds of every stage, by kind of update; a stage that an update does not have took none."""
    stages = list(dict.fromkeys(stage for r in records for stage in r["seconds"]))
    own: dict[str, list[dict]] = {}
    for record in records:
        own.setdefault(record["kind"], []).append(record["seconds"])
    return {
        kind: {stage: statistics.median(s.get(stage, 0.0) for s in seconds) for stage in stages}
        for kind, seconds in own.items()
    }


def stage_table(records: list[dict]) -> Table:
    """Median seconds of every stage, for each kind of update, and the share of the reward (OCR)."""
    found = medians(records)
    table = Table(title=f"seconds an update, medians of {len(records)} updates")
    table.add_column("stage")
    for kind in found:
        table.add_column(kind, justify="right")
    for stage in next(iter(found.values()), {}):
        table.add_row(stage, *(f"{of_kind[stage]:.3f}" for of_kind in found.values()))
    totals = [[sum(r["seconds"].values()) for r in records if r["kind"] == k] for k in found]
    table.add_row("all", *(f"{statistics.median(t):.3f}" for t in totals), style="bold")
    shares = [
        statistics.median(r["seconds"]["reward"] / sum(r["seconds"].values()) for r in records if r["kind"] == k)
        for k in found
    ]
    table.add_row("share of OCR", *(f"{share:.0%}" for share in shares))
    return table


def main() -> None:
    """Print the table of a run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    records = read_metrics(parser.parse_args().run)[SKIPPED:]
    Console().print(stage_table(records))


if __name__ == "__main__":
    main()
