"""Breaks the library one line at a time, and says which breaks no test notices: ``python -m benchmarks.mutants``.

    python -m benchmarks.mutants --seed 1 --count 100
    python -m benchmarks.mutants --seed 1 --count 100 --again         try those again that survived, after new tests

Breaks are drawn in proportion to the lines of ``algorithm/``, ``updates``, ``learner``, ``scoring``, ``rollout``,
``trainer``, ``rewards`` and ``evaluation``: a line of code, then a kind of break, then one of that kind on that line
(``benchmarks/mutation/breaks.py``: the kinds, and what is not broken as it is no behaviour). Each is tried against the
quick tests of its module (``benchmarks/mutation/targets.py``), which pass on the whole library first. It is killed if a
test fails, and timed out, so noticed too, if the tests run into the limit.

Verdicts are kept as they come in ``benchmarks/data/mutants/seed-S.jsonl``; the same command resumes. A survivor ends as
a new test, or, if it changes nothing that can be seen, with a line in ``reasons.json`` beside that file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.mutation import tries
from benchmarks.mutation.breaks import KINDS, Break, drawn
from benchmarks.mutation.targets import modules, quick_tests
from benchmarks.mutation.tries import Verdict

__all__ = ["Records", "report", "try_all"]

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "data" / "mutants"
ALLOWED = 0.03
"""Survivors without a reason, per break, with which the command still ends well."""


class Records:
    """The verdicts of one draw, one JSON line each; the first line says of which texts.

    Args:
        path: the file, made if it is missing.
        sources: text of every module of the draw.

    Raises:
        ValueError: if the file is of other texts.
    """

    def __init__(self, path: Path, sources: dict[str, str]) -> None:
        self.path = path
        texts = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in sorted(sources.items())}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"sources": texts}) + "\n")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        before = lines[0]["sources"]
        if changed := sorted(name for name in before | texts if before.get(name) != texts.get(name)):
            raise ValueError(
                f"{path} is of other texts of {', '.join(changed)}; give another seed, or remove the file to draw anew"
            )
        self.of = {(line["line"], line["key"]): line for line in lines[1:]}

    def __getitem__(self, one: Break) -> dict[str, Any]:
        return self.of[one.line, one.key]

    def lacks(self, one: Break, again: bool) -> bool:
        """Whether a break is to be tried: it was not yet, or it survived and is to be tried again."""
        known = self.of.get((one.line, one.key))
        return known is None or (again and known["verdict"] == "survived")

    def add(self, one: Break, verdict: Verdict) -> None:
        """Note a verdict, in place of an earlier one."""
        place = {name: getattr(one, name) for name in ("key", "module", "line", "kind", "before", "after")}
        self.of[one.line, one.key] = place | asdict(verdict)
        with self.path.open("a") as file:
            file.write(json.dumps(self[one]) + "\n")


def try_all(breaks: Sequence[Break], records: Records, workers: int, limit: float, root: Path = ROOT) -> None:
    """Try breaks, each against its module's tests, and note the verdicts.

    Raises:
        RuntimeError: if the tests of a module do not pass, or do not end within the limit, on the library as it is.
    """
    patterns = modules(root)
    tests = {pattern: quick_tests(root, pattern) for pattern in sorted({patterns[one.module] for one in breaks})}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, tries.open_bench, (root, limit)) as pool:
        try:
            imported = dict(zip(tests, pool.map(tries.whole, tests.values()), strict=True))
            for pattern, (verdict, _) in imported.items():
                _tell(f"unbroken {pattern}: {verdict.verdict} in {verdict.seconds} s", verdict)
            jobs = {}
            for one in breaks:
                pattern = patterns[one.module]
                ordered = quick_tests(root, pattern, one.module)
                jobs[pool.submit(tries.attempt, one, ordered, imported[pattern][1])] = one
            for done, job in enumerate(as_completed(jobs), 1):
                one, verdict = jobs[job], job.result()
                records.add(one, verdict)
                by = f" by {verdict.test}" if verdict.test else ""
                print(f"{done}/{len(breaks)} {verdict.verdict}{by}, {verdict.seconds} s: {one.key}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _tell(text: str, verdict: Verdict) -> None:
    print(text, flush=True)
    if verdict.verdict != "survived":
        raise RuntimeError(f"{text}, at {verdict.test}; they must pass before anything is broken")


def report(found: Sequence[dict[str, Any]], reasons: dict[str, str]) -> tuple[str, int]:
    """A table by module and by kind, and the survivors; and how many of these have no reason."""
    lines = []
    for column, names in (("module", sorted({one["module"] for one in found})), ("kind", KINDS)):
        lines.append(f"{column:32}  breaks  killed  timed out  survived")
        for name in [*names, "all"]:
            of = Counter(one["verdict"] for one in found if name in (one[column], "all"))
            numbers = f"{of.total():6}  {of['killed']:6}  {of['timed out']:9}  {of['survived']:8}"
            lines.append(f"{name:32}  {numbers}")
        lines.append("")
    survivors = [one for one in found if one["verdict"] == "survived"]
    open_ones = [one for one in survivors if one["key"] not in reasons]
    for one in survivors:
        lines.append(f"src/varl/{one['module']}:{one['line']}: {one['kind']}: {one['before']} -> {one['after']}")
        lines.append(f"    {reasons.get(one['key'], 'NO REASON, key: ' + json.dumps(one['key']))}")
    lines.append(f"{len(found)} breaks, {len(survivors)} survived, {len(open_ones)} of these without a reason")
    return "\n".join(lines), len(open_ones)


def _chosen(found: Iterable[str], only: Sequence[str]) -> list[str]:
    chosen = [name for name in found if not only or any(name.startswith(each) for each in only)]
    if not chosen:
        raise ValueError(f"no module begins with {' or '.join(only)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--count", type=int, default=100, help="breaks to draw")
    parser.add_argument("--workers", type=int, default=2, help="tries at a time")
    parser.add_argument("--limit", type=float, default=30.0, help="processor seconds for one try")
    parser.add_argument("--only", nargs="+", default=[], help="modules whose path begins so, for example algorithm/")
    parser.add_argument("--again", action="store_true", help="try again what survived")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the verdicts and reasons")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    names = _chosen(modules(ROOT), options.only)
    sources = {name: (ROOT / "src" / "varl" / name).read_text() for name in names}
    breaks = drawn(sources, options.seed, options.count)
    records = Records(options.data / f"seed-{options.seed}.jsonl", sources)
    if left := [one for one in breaks if records.lacks(one, options.again)]:
        try_all(left, records, options.workers, options.limit)
    reasons = options.data / "reasons.json"
    known = json.loads(reasons.read_text()) if reasons.exists() else {}
    text, without_reason = report([records[one] for one in breaks], known)
    print(text)
    return 1 if without_reason > ALLOWED * len(breaks) else 0


if __name__ == "__main__":
    sys.exit(main())
