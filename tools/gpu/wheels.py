"""Download what a machine lacks to run varl, as wheels: called by ``wheels.sh``, which says how it is used."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path

from tools.gpu.closure import Missing, SpecifierSet, Target, Version, Wheel, canonicalize_name, missing, read_installed
from tools.gpu.needs import ROOT, requirements

__all__ = ["LIMIT", "PipFetch", "main", "read_wheel", "table"]

LIMIT = 36 * 2**20
"""Bytes that all wheels together may have: they travel beside the repository, to machines lent for minutes."""


def main(words: Sequence[str] | None = None) -> None:
    """Write the wheels into a folder, in place of what it had, and print them.

    Raises:
        SystemExit: if they cannot be had, or are larger than ``LIMIT`` together; the folder is then left as it was.
    """
    parser = argparse.ArgumentParser(prog="tools/gpu/wheels.sh", description="Download what a machine lacks as wheels.")
    parser.add_argument("--python", required=True, metavar="3.12", help="the Python of the machine")
    parser.add_argument("--platform", required=True, metavar="manylinux_2_28_x86_64", help="what its glibc can run")
    parser.add_argument("--installed", required=True, type=Path, metavar="FILE", help="what `pip freeze` prints there")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "gpu" / "wheels", metavar="FOLDER")
    a = parser.parse_args(words)
    try:
        target = Target(a.python, a.platform)
        installed = read_installed(a.installed.read_text(), str(a.installed))
        with tempfile.TemporaryDirectory() as folder:
            fetch = PipFetch(target, Path(folder), pins((ROOT / "constraints.txt").read_text()))
            wheels = missing(requirements(), installed, target, fetch)
            print(table(wheels.values(), installed))
            check_size(wheels.values())
            replace(a.out, wheels.values())
    except (Missing, OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"wheels: {error}") from None
    print(f"written to {a.out}")


class PipFetch:
    """Gets wheels for a machine by this machine's pip, and by a build where only a source of pure Python exists.

    Args:
        folder: where the wheels are kept.
        constraints: versions by normalised name, preferred where they are in range and exist for the machine.
    """

    def __init__(self, target: Target, folder: Path, constraints: Mapping[str, Version]) -> None:
        self.target = target
        self.folder = folder
        self.constraints = constraints
        self._count = 0

    def __call__(self, name: str, specifier: SpecifierSet) -> Wheel:
        """A wheel in the range.

        Raises:
            Missing: if there is none, with what pip said last.
        """
        print(f"fetching {name}{specifier}", file=sys.stderr)
        pin = self.constraints.get(name)
        ranges = [f"{name}=={pin}"] if pin and specifier.contains(pin, prereleases=True) else []
        for wanted in [*ranges, f"{name}{specifier}"]:
            wheel, said = self._run(["download", *self._options(), wanted])
            if wheel is not None:
                return wheel
        wheel, built = self._run(["wheel", "--no-binary", name, f"{name}{specifier}"])
        if wheel is None:
            raise Missing(f"pip has no wheel of {name}{specifier} for the machine: {said}; nor a source: {built}")
        if wheel.path is not None and not wheel.path.name.endswith("-none-any.whl"):
            raise Missing(f"{name}{specifier} has no wheel for the machine, and its source is not pure Python")
        return wheel

    def _options(self) -> list[str]:
        tags = [word for tag in self.target.platforms() for word in ("--platform", tag)]
        version = ["--python-version", self.target.python, "--implementation", "cp"]
        return ["--only-binary", ":all:", *version, *tags]

    def _run(self, words: Sequence[str]) -> tuple[Wheel | None, str]:
        """One pip that leaves one wheel in a folder of its own; None and its last line if it does not."""
        self._count += 1
        folder = self.folder / str(self._count)
        place = "--dest" if words[0] == "download" else "--wheel-dir"
        command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps", "--retries", "1", place, str(folder)]
        ended = subprocess.run([*command, *words[1:]], capture_output=True, text=True)
        found = list(folder.glob("*.whl"))
        if ended.returncode == 0 and len(found) == 1:
            return read_wheel(found[0]), ""
        return None, (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]


def pins(text: str) -> dict[str, Version]:
    """Versions by normalised name of a file of constraints, whose lines are ``NAME==VERSION``."""
    return {name: version for name, version in read_installed(text, "constraints.txt").items() if version}


def read_wheel(path: Path) -> Wheel:
    """Name, version and requirements that a wheel states.

    Raises:
        Missing: if it is no wheel.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            head = HeaderParser().parsestr(archive.read(inside[0]).decode())
    except (zipfile.BadZipFile, IndexError, UnicodeDecodeError) as error:
        raise Missing(f"{path.name} is no wheel: {error}") from None
    requires = tuple(str(line) for line in head.get_all("Requires-Dist", []))
    return Wheel(canonicalize_name(head["Name"]), Version(head["Version"]), requires, path.stat().st_size, path)


def table(wheels: Iterable[Wheel], installed: Mapping[str, Version | None]) -> str:
    """Lines of name, version and MiB, the largest first; what replaces an installed version says which."""
    ordered = sorted(wheels, key=lambda wheel: -wheel.size)
    width = max([len(wheel.name) for wheel in ordered] + [8])
    lines = [f"{'package':{width}}  {'version':12}  {'MiB':>6}"]
    for wheel in ordered:
        instead = f"  instead of {installed[wheel.name]}" if wheel.name in installed else ""
        lines.append(f"{wheel.name:{width}}  {wheel.version!s:12}  {wheel.size / 2**20:6.2f}{instead}")
    total = sum(wheel.size for wheel in ordered) / 2**20
    return "\n".join([*lines, f"{'together':{width}}  {'':12}  {total:6.2f}  of at most {LIMIT / 2**20:.0f}"])


def check_size(wheels: Iterable[Wheel]) -> None:
    """Refuse wheels that are too large together.

    Raises:
        Missing: if they are, naming the largest.
    """
    ordered = sorted(wheels, key=lambda wheel: -wheel.size)
    if sum(wheel.size for wheel in ordered) > LIMIT:
        names = ", ".join(wheel.name for wheel in ordered[:3])
        raise Missing(f"the wheels are larger than {LIMIT / 2**20:.0f} MiB together; the largest are {names}")


def replace(folder: Path, wheels: Iterable[Wheel]) -> None:
    """Leave these wheels, and no others, in a folder; what else it holds is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    for wheel in wheels:
        assert wheel.path is not None
        shutil.copy2(wheel.path, folder)


if __name__ == "__main__":
    main()
