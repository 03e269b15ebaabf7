"""What varl needs on a machine: requirements as pyproject.toml states them, and the modules that must import."""

from __future__ import annotations

import importlib
import importlib.util
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["MODULES", "ROOT", "absent", "requirements", "unimportable"]

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

EXTRAS = ("infinity", "switti", "tokenflow", "lora")
"""Extras of varl that the tests on a GPU use."""
LEFT_OUT = ("sentencepiece",)
"""What only tokenizers of published checkpoints read; no published checkpoint travels."""
FOR_TESTS = ("pytest", "hypothesis")
"""What the tests need of the extra ``dev``."""

MODULES = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors.torch",
    "pyyaml": "yaml",
    "jsonargparse": "jsonargparse",
    "docstring-parser": "docstring_parser",
    "typeshed-client": "typeshed_client",
    "rich": "rich.console",
    "pillow": "PIL.Image",
    "matplotlib": "matplotlib.figure",
    "tensorboard": "torch.utils.tensorboard",
    "rapidfuzz": "rapidfuzz",
    "opencv-python-headless": "cv2",
    "pyclipper": "pyclipper",
    "shapely": "shapely",
    "omegaconf": "omegaconf",
    "onnxruntime": "onnxruntime",
    "rapidocr": "rapidocr",
    "transformers": "transformers",
    "protobuf": "google.protobuf",
    "accelerate": "accelerate",
    "peft": "peft",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
"""A module of each distribution that varl needs, and of those that its parts import only when used."""


def requirements(root: Path = ROOT) -> list[str]:
    """The requirements of varl with its extras, and of its tests, as pyproject.toml writes them."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras: Mapping[str, Sequence[str]] = project["optional-dependencies"]
    found = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    found += [line for line in extras["dev"] if line.startswith(FOR_TESTS)]
    return [line for line in found if not line.startswith(LEFT_OUT)]


def absent() -> list[str]:
    """The distributions of ``MODULES`` of which no module is found; nothing is imported for that but packages."""
    return [name for name, module in MODULES.items() if not _found(module)]


def unimportable() -> list[str]:
    """What varl needs and cannot import, each with the error; then varl itself, if it is only that which fails."""
    problems = [f"{name} is needed: {error}" for name, module in MODULES.items() if (error := _error(module))]
    own = None if problems else _error("varl.cli")
    return [*problems, *([f"varl itself does not import: {own}"] if own else [])]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises, it is named and the next one is tried
        return f"import {module} raised {type(error).__name__}: {error}"
    return None
