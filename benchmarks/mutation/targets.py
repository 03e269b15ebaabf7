"""Which modules are broken, and which tests are to notice: the quick ones of each module, the most telling first."""

from __future__ import annotations

from pathlib import Path

__all__ = ["TARGETS", "modules", "quick_tests"]

TARGETS: dict[str, tuple[str, ...]] = {
    "algorithm/advantages.py": ("tests/algorithm/test_advantages*.py", "tests/algorithm/test_theory.py"),
    "algorithm/loss.py": ("tests/algorithm/test_loss*.py", "tests/test_learner_loss*.py"),
    "algorithm/mask_propagation.py": ("tests/algorithm/test_mask_propagation*.py",),
    "algorithm/middle_return.py": ("tests/algorithm/test_middle_return*.py", "tests/algorithm/test_theory.py"),
    "algorithm/scale_weights.py": ("tests/algorithm/test_scale_weights*.py",),
    "updates*.py": (
        *("tests/test_updates*.py", "tests/test_records.py", "tests/test_learner_loss*.py"),
        "tests/test_whole_updates.py",
    ),
    "learner*.py": (
        *("tests/test_learner*.py", "tests/test_records.py", "tests/test_savings.py", "tests/test_moments.py"),
        "tests/test_settings_method.py",
    ),
    "scoring.py": ("tests/test_scoring*.py", "tests/test_rollout*.py"),
    "rollout.py": ("tests/test_rollout*.py", "tests/test_updates*.py"),
    "trainer*.py": (
        *("tests/test_trainer*.py", "tests/test_records.py", "tests/test_whole_updates.py", "tests/test_cheaper*.py"),
    ),
    "rewards/*.py": ("tests/rewards/test_*.py", "tests/test_cheaper*.py"),
    "evaluation/*.py": ("tests/evaluation/test_*.py",),
}
"""Modules under ``src/varl``, by pattern, and their tests. What a later pattern matches too belongs to the first."""


def modules(root: Path) -> dict[str, str]:
    """Path under ``src/varl`` of every module that is broken, and the pattern it comes by.

    Raises:
        FileNotFoundError: if a pattern matches no file.
    """
    package = root / "src" / "varl"
    found: dict[str, str] = {}
    for pattern in TARGETS:
        paths = [path for path in _matching(package, pattern) if path.name != "__init__.py"]
        for path in paths:
            found.setdefault(path.relative_to(package).as_posix(), pattern)
    return found


def quick_tests(root: Path, pattern: str, module: str = "") -> list[str]:
    """The test files of the modules of a pattern, the most telling first; before them those named as the module is.

    Raises:
        FileNotFoundError: if one matches no file.
    """
    files = [path.relative_to(root).as_posix() for each in TARGETS[pattern] for path in _matching(root, each)]
    own = f"test_{Path(module).stem}"
    return sorted(dict.fromkeys(files), key=lambda file: not Path(file).stem.startswith(own))


def _matching(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder / pattern} matches no file; mend benchmarks/mutation/targets.py")
    return found
