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

SKIPPED = 2
"""First updates of a run that are left out: they load the reward and warm the caches."""


def stage_table(records: list[dict]) -> Table:
    """Median seconds of every stage, for each kind of update, and the share of the reward (OCR)."""
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    stages = list(dict.fromkeys(stage for r in records for stage in r["seconds"]))
    table = Table(title=f"seconds an update, medians of {len(records)} updates")
    table.add_column("stage")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for stage in stages:
        row = [statistics.median(r["seconds"].get(stage, 0.0) for r in records if r["kind"] == k) for k in kinds]
        table.add_row(stage, *(f"{seconds:.3f}" for seconds in row))
    totals = [[sum(r["seconds"].values()) for r in records if r["kind"] == k] for k in kinds]
    table.add_row("all", *(f"{statistics.median(t):.3f}" for t in totals), style="bold")
    shares = [
        statistics.median(r["seconds"]["reward"] / sum(r["seconds"].values()) for r in records if r["kind"] == k)
        for k in kinds
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
