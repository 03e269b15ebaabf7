"""Checkpoints: what comes back, what is kept, what is damaged, what cannot be written, and several processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from patience import PATIENCE
from varl.errors import RunError
from varl.run import checkpoint as module
from varl.run import faults
from varl.run.checkpoint import Checkpoints, Damaged, read_manifest

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "step": torch.tensor(7.0),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "large": torch.tensor([2**62 + 1, -1]),
    "none": torch.zeros(0, 3),
    "special": torch.tensor([-0.0, torch.inf, 1e-45]),
}


def saved(folder: Path, *updates: int, keep: int = 9, best: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for update in updates:
        tensors = {name: value + update if name == "matrix" else value for name, value in TENSORS.items()}
        checkpoints.save(update, tensors, {"pictures": update}, best)
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bitwise(tmp_path: Path) -> None:
    given = {"a": 0.1, "b": [1, None, "é"], "c": {"d": 1e300}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(3, TENSORS, given, None)
    checkpoints.wait()
    found = Checkpoints(tmp_path / "checkpoints", 2).latest()
    assert found is not None
    assert (found.update, found.values, found.names()) == (3, given, sorted(TENSORS))
    loaded = {name: torch.ones_like(value) for name, value in TENSORS.items()}
    found.load(loaded)
    for name, value in TENSORS.items():
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


def test_views_that_are_not_contiguous_come_back(tmp_path: Path) -> None:
    """Some families decode to pictures whose channels lie last, and those may be pending."""
    picture, weight = torch.rand(2, 4, 4, 3).permute(0, 3, 1, 2), torch.rand(3, 5).t()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"images": picture, "weight": weight}, {}, best=None)
    checkpoints.wait()
    found = {"images": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3, 5).t()}
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    checkpoint.load(found)
    assert torch.equal(found["images"], picture)
    assert torch.equal(found["weight"], weight)


def test_none_yet(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", 2).latest() is None


def test_tensors_may_change_while_they_are_written(tmp_path: Path) -> None:
    weight, go_on = torch.zeros(1000), threading.Event()

    def hold(name: str) -> None:
        if name == "checkpoint folder made":
            go_on.wait(PATIENCE)

    checkpoints = Checkpoints(tmp_path, 2)
    with faults.armed(hold):
        checkpoints.save(1, {"weight": weight}, {}, None)
        weight.fill_(9)
        checkpoints.check()  # does not wait
        assert not (tmp_path / "update-000001").exists()
        go_on.set()
        checkpoints.save(2, {"weight": weight}, {}, None)  # at most one at a time: the first is there now
        assert (tmp_path / "update-000001").exists()
        checkpoints.wait()
    for update, value in ((1, 0.0), (2, 9.0)):
        loaded = {"weight": torch.ones(1000)}
        module.Checkpoint(tmp_path / f"update-{update:06d}", update, {}).load(loaded)
        assert loaded["weight"].unique().tolist() == [value]


@pytest.mark.parametrize(
    ("keep", "best", "expected"), [(1, None, [40]), (2, None, [30, 40]), (2, 10, [10, 30, 40]), (2, 40, [30, 40])]
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, expected: list[int]) -> None:
    saved(tmp_path, 10, 20, 30, 40, keep=keep, best=best)
    assert names(tmp_path) == [f"update-{update:06d}" for update in expected]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, keep=3, best=10)
    (tmp_path / "partial.update-000040").mkdir()
    found = Checkpoints(tmp_path, 1).latest()
    assert found is not None
    assert names(tmp_path) == ["update-000010", "update-000030"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_links_and_files_in_place_of_checkpoints_are_removed_and_what_they_lead_to_stays(
    tmp_path: Path, elsewhere: bool
) -> None:
    folder = tmp_path / "checkpoints"
    saved(folder, 10, 20, 30)
    if elsewhere:
        (folder / "update-000010").rename(tmp_path / "other-disk")
        (folder / "update-000010").symlink_to(tmp_path / "other-disk")
    (folder / "partial.update-000040").write_text("a file")
    (folder / "partial.update-000010").write_text("where the old one is moved to be removed")
    found = Checkpoints(folder, 2).latest()
    assert found is not None
    assert names(folder) == ["update-000020", "update-000030"]
    assert not elsewhere or read_manifest(tmp_path / "other-disk")["update"] == 10


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    """The metadata of a safetensors file is written in random order, unless it is put in order."""
    shards = set()
    for number in range(6):
        saved(tmp_path / str(number), 10)
        shards |= {path.read_bytes() for path in (tmp_path / str(number)).rglob("*") if path.is_file()}
    assert len(shards) == 2  # the tensors and the manifest


def test_more_than_a_million_updates_are_in_order(tmp_path: Path) -> None:
    saved(tmp_path, 999_999, 1_000_000, keep=1)
    assert names(tmp_path) == ["update-1000000"]


def shard(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_place(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda folder: os.truncate(shard(folder), 100), "has 100 bytes, not"),
    "a flipped bit": (lambda folder: change(shard(folder), -1), "was altered: its SHA-256"),
    "a flipped bit in the header": (lambda folder: change(shard(folder), 3), "was altered: its SHA-256"),
    "a file gone": (lambda folder: shard(folder).unlink(), "is missing"),
    "a file too many": (lambda folder: (folder / "more.safetensors").touch(), "is not in the manifest"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 50), "manifest.json cannot be read"),
    "a pipe": (lambda folder: in_place(folder / "manifest.json", os.mkfifo), "manifest.json is no file"),
    "a folder": (lambda folder: in_place(shard(folder), os.mkdir), "is no file"),
    "an edited manifest": (lambda folder: edit(folder / "manifest.json", values={}), "manifest.json was altered"),
    "a manifest of another kind": (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    damage, why = DAMAGE[case]
    saved(tmp_path, 10, 20, 30)
    damage(tmp_path / "update-000030")
    with pytest.raises(Damaged, match=why):
        read_manifest(tmp_path / "update-000030")
    with caplog.at_level(logging.WARNING):
        found = Checkpoints(tmp_path, 9).latest()
    assert found is not None
    assert (found.update, found.values) == (20, {"pictures": 20})
    (message,) = caplog.messages
    assert "update-000030" in message
    assert why in message
    assert names(tmp_path) == ["update-000010", "update-000020", "update-000030.damaged"]
    found.load(loaded := {"matrix": torch.zeros(2, 3)})
    assert torch.equal(loaded["matrix"], TENSORS["matrix"] + 20)
    saved(tmp_path, 30)
    assert read_manifest(tmp_path / "update-000030")["update"] == 30


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(Damaged, match="has format 1; this version of varl reads format 2"):
        read_manifest(tmp_path / "update-000010")


def test_none_whole_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    for update in (10, 20):
        change(shard(tmp_path / f"update-{update:06d}"), -1)
    with pytest.raises(RunError, match=r"none of the checkpoints in .* is whole .*update-000020.*update-000010"):
        Checkpoints(tmp_path, 2).latest()
    assert names(tmp_path) == ["update-000010", "update-000020"]


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    found = saved(tmp_path, 10).latest()
    assert found is not None
    with pytest.raises(ValueError, match="lacks 1 tensors of this run, such as other"):
        found.load({"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"does not fit this run: .*matrix"):
        found.load({"matrix": torch.zeros(3, 3)})


def test_a_failed_write_is_raised_at_the_next_call_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 10)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.dcp, "save", full)
    checkpoints.save(20, TENSORS, {}, None)
    assert checkpoints._pending is not None
    assert checkpoints._pending.exception(timeout=PATIENCE) is not None
    with pytest.raises(RunError, match=r"update-000020 cannot be written: No space left on device"):
        checkpoints.check()
    assert names(tmp_path) == ["update-000010"]
    checkpoints.check()  # an error is raised once
    monkeypatch.undo()
    checkpoints.save(30, TENSORS, {}, None)
    checkpoints.wait()
    assert names(tmp_path) == ["update-000010", "update-000030"]


@pytest.mark.slow
def test_an_older_torch_is_named_before_anything_else() -> None:
    older = "import torch.distributed.checkpoint.staging as staging; del staging.DefaultStager; import varl.cli"
    ended = subprocess.run([sys.executable, "-c", older], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: checkpoints need torch 2.9 or newer, this is {torch.__version__}")


# --- Several processes: a checkpoint of 2 is read by 1 and by 3. ---

WHOLE = {"even": torch.arange(24.0).view(6, 4), "odd": torch.arange(5.0), "one": torch.tensor([[3.0]])}


def sharded() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(value.clone(), mesh, [Shard(0)]) for name, value in WHOLE.items()}


def process(rank: int, world: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    checkpoints = Checkpoints(Path(folder), 2)
    if world == 2:
        own = {f"rng.{rank}": torch.tensor([rank])}
        checkpoints.save(1, sharded() | {"plain": torch.tensor(5.0)} | own, {"rank": rank}, None)
        checkpoints.wait()
        if rank == 0:
            checkpoints._finish = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore
        checkpoints.save(2, sharded(), {}, None)
        message = ""
        try:
            checkpoints.wait()
        except RunError as error:
            message = str(error)
        assert ("No space left" if rank == 0 else "another process says why") in message
    found = checkpoints.latest()
    assert found is not None
    assert (found.update, found.values) == (1, {"rank": 0})
    empty = {name: torch.zeros_like(value) for name, value in sharded().items()}
    plain = torch.zeros(())
    found.load({**empty, "plain": plain})
    assert float(plain) == 5
    for name, value in WHOLE.items():
        full = empty[name]
        assert isinstance(full, DTensor)
        assert torch.equal(full.full_tensor(), value), name
    dist.destroy_process_group()


def test_a_checkpoint_of_two_processes_is_read_by_one_and_by_three(tmp_path: Path) -> None:
    for world in (2, 3):
        given = (world, str(tmp_path / f"store-{world}"), str(tmp_path / "checkpoints"))
        torch.multiprocessing.start_processes(process, given, nprocs=world, start_method="fork")
    found = Checkpoints(tmp_path / "checkpoints", 2).latest()
    assert found is not None
    assert set(found.names()) == {*WHOLE, "plain", "rng.0", "rng.1"}
    found.load(loaded := {name: torch.zeros_like(value) for name, value in WHOLE.items()})
    assert all(torch.equal(loaded[name], value) for name, value in WHOLE.items())


def shared_in_other_orders(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    checkpoints, shared = Checkpoints(Path(folder), 2), {name: torch.zeros(size) for name, size in SIZES.items()}
    for update, order in enumerate((sorted(shared), sorted(shared, reverse=True))):
        checkpoints.save(update, {name: shared[name] for name in order}, {}, None)
        checkpoints.wait()
    dist.destroy_process_group()


SIZES = {"a": 9, "b": 2, "c": 5, "d": 1, "e": 7}


def test_which_process_writes_what_both_hold_does_not_follow_their_order(tmp_path: Path) -> None:
    given = (str(tmp_path / "store"), str(tmp_path / "checkpoints"))
    torch.multiprocessing.start_processes(shared_in_other_orders, given, nprocs=2, start_method="fork")
    found = [
        {path.name: sorted(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}
        for folder in Checkpoints(tmp_path / "checkpoints", 2).paths()
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert sorted(name for names in found[0].values() for name in names) == sorted(SIZES)
