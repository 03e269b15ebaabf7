"""A small random policy and prompts that many tests share, and which tests are of numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny_runs
from small import make_inkling, make_prompts
from varl.models.inkling import Inkling
from varl.policy import Prompt

torch.set_num_threads(1)

HERE = Path(__file__).parent
FOLDER = Path.cwd()

NUMERIC = ("algorithm", "models", "evaluation", "families", "learner", "rollout", "sampling", "scoring", "updates")
NUMERIC += ("adapters", "cheaper", "ema", "example", "policy_settings", "probe", "savings")
"""Folders of tests, and beginnings of modules' names after ``test_``, that compare computed numbers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ``tests/gpu``, here so that they are known whether that folder is named or found."""
    group = parser.getgroup("gpu", "tests on a GPU")
    group.addoption("--gpu-device", help="where they run: cuda, by default if torch sees a GPU; or cpu, a rehearsal")
    group.addoption("--gpu-report", type=Path, help="a JSON file for what they measure")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark quick tests of numbers; ``make test-processors`` runs them as other processors would compute."""
    for item in [item for item in items if HERE in item.path.parents]:
        names = [name.removeprefix("test_") for name in item.path.relative_to(HERE).parts]
        if names[0].startswith(NUMERIC) and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.numeric)


@pytest.fixture(autouse=True)
def _stays_in_its_folder() -> Iterator[None]:
    """A test that leaves the working directory changed, at once or later from a thread, is named."""
    assert Path.cwd() == FOLDER, "a test before this one changed the working directory"
    yield
    assert Path.cwd() == FOLDER, "this test changed the working directory"


@pytest.fixture(autouse=True)
def _stays_loud() -> Iterator[None]:
    """Benchmarks make the library's log quiet, in a process that is theirs."""
    level = logging.getLogger("varl").level
    yield
    logging.getLogger("varl").setLevel(level)


@pytest.fixture(scope="session")
def _shared_inkling() -> Inkling:
    return make_inkling()


@pytest.fixture
def inkling(_shared_inkling: Inkling) -> Inkling:
    """A small random policy, shared: tests must not change it."""
    return _shared_inkling


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random policy: tests must not change it."""
    return tiny_runs.tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def prompts() -> list[Prompt]:
    """Eight prompts."""
    return make_prompts(8)
