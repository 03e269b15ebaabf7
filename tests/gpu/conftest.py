"""What runs on a device: which one, and the report. The options are defined in ``tests/conftest.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
import tiny_runs
from gpu.measuring import Report
from gpu.pairs import Pair, make_pair
from varl.loading import choose_device

HERE = Path(__file__).parent
NO_GPU = "torch sees no GPU; --gpu-device cpu rehearses this without one"
SESSION = pytest.StashKey[Report]()
PAIRS: dict[str, Pair] = {}


def chosen(config: pytest.Config) -> torch.device | None:
    """The device; None if none was asked for and there is no GPU.

    Raises:
        pytest.UsageError: if one is asked for that is not there.
    """
    asked = config.getoption("--gpu-device")
    if asked is None and not torch.cuda.is_available():
        return None
    try:
        device = choose_device(asked or "cuda")
    except ValueError as error:
        raise pytest.UsageError(f"--gpu-device: {error}") from error
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class Recorder:
    """Notes how tests of this folder end, and writes the report at the end of the session."""

    def __init__(self, report: Report, path: Path | None) -> None:
        self.report, self.path = report, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        own = HERE.name in Path(report.nodeid.partition("::")[0]).parent.parts
        if own and (report.when == "call" or report.outcome != "passed"):
            self.report.outcomes[report.outcome] += 1
            if report.failed:
                self.report.failed.append(report.nodeid)
            self._write()  # at once: a time limit leaves what is known by then

    def pytest_sessionfinish(self) -> None:
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.report.write(self.path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; if there is a device for them, begin its report."""
    own = [item for item in items if HERE in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.gpu)
    device = chosen(config) if own else None
    if device is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, long before a test asks for it
        config.stash[SESSION] = Report(str(device))
        config.pluginmanager.register(Recorder(config.stash[SESSION], config.getoption("--gpu-report")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SESSION not in item.config.stash:
        pytest.skip(NO_GPU)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    """Where differences and facts are noted."""
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def device(report: Report) -> torch.device:
    """The GPU, or in a rehearsal the CPU in its place."""
    return torch.device(report.device)


@pytest.fixture(scope="session", autouse=True)
def lone(
    request: pytest.FixtureRequest, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[list[dict[str, Any]]]]:
    """What ``lone.runs`` finds, in a process of its own that works beside all other tests, from the first one on.

    It joins a group by a port that the system chooses.
    """
    with ThreadPoolExecutor(1) as pool:
        if any("test_processes" in item.nodeid for item in request.session.items):
            folder = tmp_path_factory.mktemp("lone")
            tiny_runs.tiny_weights(folder / "tiny.safetensors")
            (folder / "device.txt").write_text(str(device))
            yield pool.submit(processes.run, 1, "gpu.lone.runs", folder)
        else:
            yield Future()


@pytest.fixture
def pair(request: pytest.FixtureRequest, device: torch.device) -> Pair:
    """A family on the CPU and on the device, shared: tests must not change it."""
    name = request.param
    if name not in PAIRS:
        PAIRS[name] = make_pair(name, device)
    return PAIRS[name]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 is fp32, unless a test says otherwise, and no test leaves its precision behind."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
