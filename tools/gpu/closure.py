"""Which packages a machine lacks: the requirements of varl and, in turn, of what is fetched for it.

Requirements hold or not for the target machine (its Python and platform), never for the one this runs on. What is
installed there counts as complete: only its version is compared, and the extras that somebody asks of it are followed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

try:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version
except ImportError:
    raise SystemExit("the package 'packaging' is missing here; install it: python3 -m pip install packaging") from None

__all__ = ["Installed", "Missing", "Target", "Wheel", "missing", "read_installed"]

HEAVY = ("torch", "triton", "nvidia-*", "cuda-*", "numpy", "transformers", "onnxruntime*", "opencv-*")
"""What a machine must bring itself: it is large, or other packages there were built against it."""

SAME = (
    ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
    ("onnxruntime", "onnxruntime-gpu"),
)
"""Distributions that bring the same modules; any of them counts."""

STEPS = 500
"""Fetches after which requirements are taken to contradict one another."""


class Missing(ValueError):
    """What the machine lacks cannot be carried; the message says what, and why."""


Installed = Mapping[str, "Version | None"]
"""Versions by normalised name; None where the list does not say."""


class Wheel(NamedTuple):
    """A wheel that was fetched."""

    name: str
    version: Version
    requires: tuple[str, ...]
    size: int
    """In bytes."""
    path: Path | None = None


Fetch = Callable[[str, SpecifierSet], Wheel]
"""Gets a wheel of a distribution, by normalised name, in a range of versions."""


@dataclass(frozen=True)
class Target:
    """A machine that wheels are made for: CPython on Linux.

    Raises:
        Missing: if the Python is not like 3.12 or 3.12.4, or the platform not like manylinux_2_28_x86_64.
    """

    python: str
    platform: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.\d+(\.\d+)?", self.python):
            raise Missing(f"--python must be a version like 3.12, got {self.python!r}")
        if not re.fullmatch(r"manylinux_2_\d+_[a-z0-9_]+", self.platform):
            raise Missing(f"--platform must be like manylinux_2_28_x86_64, got {self.platform!r}")

    @property
    def minor(self) -> str:
        """As 3.12."""
        return ".".join(self.python.split(".")[:2])

    @property
    def machine(self) -> str:
        """As x86_64."""
        return self.platform.split("_", 3)[3]

    def platforms(self) -> list[str]:
        """Tags of wheels that run there, the newest first: a glibc runs what older ones do."""
        names = [f"manylinux_2_{minor}" for minor in range(int(self.platform.split("_")[2]), 4, -1)]
        old = {"manylinux_2_17": "manylinux2014", "manylinux_2_12": "manylinux2010", "manylinux_2_5": "manylinux1"}
        names = [each for name in names for each in (name, old.get(name)) if each]
        return [f"{name}_{self.machine}" for name in [*names, "linux"]]

    def environment(self) -> dict[str, str]:
        """What markers of requirements are compared with; a Python without a third number is taken as its first."""
        full = self.python if self.python.count(".") == 2 else f"{self.python}.0"
        return {
            "implementation_name": "cpython",
            "implementation_version": full,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": full,
            "python_version": self.minor,
            "sys_platform": "linux",
        }


def read_installed(text: str, where: str = "the list") -> dict[str, Version | None]:
    """Names and versions from lines as ``pip freeze`` prints them.

    A line is ``NAME``, ``NAME==VERSION`` or ``NAME @ address``; comments and packages that are linked to a folder
    (``-e``) are passed over.

    Raises:
        Missing: if a line is none of these, or nothing is listed.
    """
    found: dict[str, Version | None] = {}
    # Some editors begin a file with a mark of its encoding.
    for number, whole in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", whole).strip()
        if not line or line.startswith("-e "):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:===?\s*(\S+)|@\s*\S+)?", line)
        try:
            if match is None:
                raise InvalidVersion(line)
            found[canonicalize_name(match[1])] = Version(match[2]) if match[2] else None
        except InvalidVersion:
            raise Missing(f"{where}, line {number}: expected NAME or NAME==VERSION, got {line!r}") from None
    if not found:
        raise Missing(f"{where} names no package; write what `pip freeze` prints on the machine")
    return found


@dataclass
class Need:
    """What is asked of one distribution."""

    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    extras: set[str] = field(default_factory=set)
    by: list[str] = field(default_factory=list)
    """Who asks, each with its range."""


def missing(requirements: Iterable[str], installed: Installed, target: Target, fetch: Fetch) -> dict[str, Wheel]:
    """The wheels that requirements need beside what is installed, one version of each, by name.

    Args:
        requirements: as pyproject.toml writes them.
        fetch: called for what is missing, and again for a narrower range if two ask for different ones; also for an
            installed distribution whose extras are asked for, to read what these are.

    Raises:
        Missing: if a heavy one is missing or out of range, or requirements contradict one another.
    """
    wheels: dict[str, Wheel] = {}
    described: dict[str, Wheel] = {}
    for _ in range(STEPS):
        needs = _needs(list(requirements), installed, target, wheels, described)
        for name, need in needs.items():
            if _carried(name, need, installed):
                if name not in wheels or not need.specifier.contains(wheels[name].version, prereleases=True):
                    wheels[name] = fetch(name, need.specifier)
                    break
            elif need.extras and name not in described:
                version = installed[name]
                described[name] = fetch(name, SpecifierSet(f"=={version.public}") if version else need.specifier)
                break
        else:
            carried = [name for name, need in needs.items() if _carried(name, need, installed)]
            return {name: wheels[name] for name in carried}
    asked = "; ".join(f"{name} by {', '.join(need.by)}" for name, need in needs.items() if len(need.by) > 1)
    raise Missing(f"no versions were found that satisfy each other; asked for by several: {asked}")


def _carried(name: str, need: Need, installed: Installed) -> bool:
    """Whether a wheel must be carried: the machine has none, or one out of range.

    Raises:
        Missing: if so, and it is heavy.
    """
    heavy = any(fnmatch.fnmatch(name, pattern) for pattern in HEAVY)
    if name not in installed:
        if heavy:
            raise Missing(f"{name} is not in the list of what is installed, and is too heavy to carry: {_asked(need)}")
        return True
    version = installed[name]
    if version is None or need.specifier.contains(version, prereleases=True):
        return False
    if heavy:
        raise Missing(f"{name} {version} is installed and is too heavy to replace, but is out of range: {_asked(need)}")
    return True


def _asked(need: Need) -> str:
    return "asked for by " + ", ".join(need.by)


def _needs(
    roots: list[str], installed: Installed, target: Target, wheels: Mapping[str, Wheel], described: Mapping[str, Wheel]
) -> dict[str, Need]:
    """Everything asked for, following the wheels at hand, and of installed ones only the extras."""
    needs: dict[str, Need] = {}
    queue = [(requirement, "varl") for requirement in _holding(roots, target, [""])]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement, by = queue.pop(0)
        if (by, str(requirement)) in seen:
            continue
        seen.add((by, str(requirement)))
        name = _as_installed(canonicalize_name(requirement.name), installed)
        need = needs.setdefault(name, Need())
        need.specifier &= requirement.specifier
        need.extras |= requirement.extras
        need.by.append(f"{by} ({requirement})")
        extras = sorted(need.extras)
        if name in wheels:
            queue += [(each, name) for each in _holding(wheels[name].requires, target, ["", *extras])]
        elif name in described:
            without = {str(each) for each in _holding(described[name].requires, target, [""])}
            found = _holding(described[name].requires, target, extras)
            queue += [(each, name) for each in found if str(each) not in without]
    return needs


def _as_installed(name: str, installed: Installed) -> str:
    """The name itself, or that of another distribution with its modules, if only that one is installed."""
    same = next((names for names in SAME if name in names), ())
    return next((each for each in (name, *same) if each in installed), name)


def _holding(lines: Iterable[str], target: Target, extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that hold on the target for any of some extras ("" is none)."""
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise Missing(f"a requirement cannot be read: {line!r}: {error}") from None
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**target.environment(), "extra": extra}) for extra in extras):
            yield requirement
