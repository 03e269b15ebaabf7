"""Several processes give the numbers of one: gradients, whole runs, what they send, and how they end."""

from __future__ import annotations

import math
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distributed_runs
import processes
import tiny_runs
from varl.config import MethodConfig, ParallelConfig
from varl.distributed import Distributed
from varl.schedule import ScaleSchedule
from varl.trainer import Trainer
from varl.updates import plan

SPREAD = 1e-6
"""Largest relative difference of gradients in fp32: what rounding makes of another batch of rows."""
LESS_EXACT = {"switti": 1e-5, "switti-nonar": 1e-5}
"""Families whose tiny models amplify it; their micro-batches differ by as much in one process."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    tiny_runs.tiny_weights(made / "tiny.safetensors")
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return distributed_runs.in_fp64(folder, 1)


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return processes.run(2, "distributed_runs.two", folder)


@pytest.fixture(scope="module")
def three(folder: Path) -> list[dict[str, Any]]:
    return processes.run(3, "distributed_runs.three", folder)


@pytest.mark.slow
def test_given_the_same_actions_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    found, _ = processes.run(2, "distributed_cases.gradients", tmp_path)
    assert len(found) > 20
    for name, differences in found.items():
        family, case = name.split(": ")
        most = 2e-2 if "bf16" in case else LESS_EXACT.get(family, SPREAD)
        assert max(differences.values()) < most, (name, differences)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["two", "three"])
def test_runs_in_fp64_are_those_of_one_process(
    request: pytest.FixtureRequest, alone: dict[str, Any], size: str
) -> None:
    found, largest = [one["runs"] for one in request.getfixturevalue(size)], 0.0
    for name in found[0]:
        expected = alone[f"{name.split(',')[0]}, ddp"]
        for update, actions in enumerate(expected["actions"]):
            assert torch.equal(torch.cat([one[name]["actions"][update] for one in found]), actions), (name, update)
        largest = max(largest, assert_same_run(found[0][name], expected))
    print(f"{size} processes against one: largest relative difference of weights {largest:.1e}")


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Returns the largest relative difference of weights."""
    largest = 0.0
    for key, value in expected["weights"].items():
        difference = float((found["weights"][key] - value).norm())
        assert difference <= 1e-8 * float(value.norm()), key
        largest = max(largest, difference / float(value.norm())) if difference else largest
    for one, other in [(found["evaluations"][at], expected["evaluations"][at]) for at in (0, -1)]:
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["rewards"], other["rewards"])
    assert len(found["metrics"]) == len(expected["metrics"]) > 0
    for record, same in zip(found["metrics"], expected["metrics"], strict=True):
        assert_close(record, same)
    return largest


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    else:
        assert found == expected


@pytest.mark.slow
def test_micro_batches_are_chosen_together_under_fsdp2(alone: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["measured"]["sizes"] == {"prefix": 4, "suffix": 4}
    assert_same_run(two[0]["measured"]["run"], alone["alternate, ddp"])
    norms = two[0]["measured"]["norms"]
    assert [len(of_update) for of_update in norms] == [4, 4, 1]
    assert all(0 < norm < math.inf for of_update in norms for norm in of_update)


@pytest.mark.slow
def test_a_rollout_gathers_each_unit_once(two: list[dict[str, Any]]) -> None:
    for found in [one["counted"] for one in two]:
        assert found["units"] == 1 + tiny_runs.TINY.depth
        assert found["scales"] == len(tiny_runs.TINY.grids) > 1
        assert found["sent"] == {"allgather_base": found["units"]}


@pytest.mark.slow
def test_what_an_update_sends_is_the_closed_form(two: list[dict[str, Any]]) -> None:
    for name, kinds in two[0]["counted"]["bytes"].items():
        for kind, (counted, form) in kinds.items():
            # Units are padded to a multiple of the processes, and the gradient's norm is a few numbers more.
            assert counted == pytest.approx(form, rel=2e-3, abs=64), (name, kind)


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_adapters_are_exported_whole_and_merged(folder: Path) -> None:
    base = load_file(folder / "tiny.safetensors")
    for name in ("adapters", "weights"):
        ddp, fsdp2 = (load_file(folder / f"lora-{mode}" / f"{name}.safetensors") for mode in ("ddp", "fsdp2"))
        assert ddp.keys() == fsdp2.keys()
        for key, value in ddp.items():
            torch.testing.assert_close(fsdp2[key], value, rtol=0, atol=1e-3)
    assert fsdp2.keys() == base.keys()
    changed = {key.rsplit(".", 2)[1] for key, value in fsdp2.items() if not torch.equal(value, base[key])}
    assert changed == {"qkv", "out", "up", "down"}


@pytest.mark.slow
@pytest.mark.usefixtures("three")
def test_a_run_goes_on_in_another_number_of_processes(folder: Path, alone: dict[str, Any]) -> None:
    distributed_runs.one_begins(folder)
    found, _ = processes.run(2, "distributed_runs.two_again", folder)
    assert (len(found["three"]["actions"]), len(found["one"]["actions"])) == (1, 1)
    assert_same_run(found["three"], alone["segments, ddp"])
    assert_same_run(found["one"], alone["reused, ddp"])


@pytest.mark.slow
def test_when_one_process_fails_all_end_and_one_speaks(tmp_path: Path) -> None:
    first, second = processes.launch(2, "-m", "processes", "distributed_runs.one_fails", str(tmp_path))
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr == ""
    assert "ValueError: the disk is full" in second.stderr
    assert "process 1 of 2 was the first to fail" in second.stderr


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]


def command(folder: Path, *words: str) -> list[str]:
    """``varl train`` on a tiny run."""
    options = {
        "policy.weights": folder / "tiny.safetensors",
        "run.out": folder / "command",
        "run.device": "cpu",
        "evaluation.enabled": "false",
        "method.prompts": 2,
        "method.group": 3,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["-m", "varl", "train", *given, *words]


@pytest.mark.slow
def test_a_command_that_one_process_cannot_carry_out_says_so_once(folder: Path) -> None:
    first, second = processes.launch(2, *command(folder, "--reward", "unkind:here_only"))
    assert (first.returncode, second.returncode) == (1, 2)
    assert first.stderr == ""
    assert "error:" in second.stderr
    assert "here_only" in second.stderr


def test_sequences_that_cannot_be_shared_equally_are_refused_before_work(folder: Path) -> None:
    three = Distributed()
    three.size = 3
    made = replace(distributed_runs.config(folder, "uneven"), method=MethodConfig(prompts=2, group=4))
    with pytest.raises(ValueError, match=r"8 sequences .* cannot be shared equally by 3 processes; make them a multip"):
        Trainer(made, three)
    assert not made.run.out.exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(folder: Path) -> None:
    first, second = processes.launch(2, *command(folder, "--reward", "unkind:killing"))
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1
    assert "process 0 of 2 was the first to fail, or to lose another" in first.stderr


@pytest.mark.slow
def test_torchrun_starts_killed_processes_again(folder: Path, tmp_path: Path) -> None:
    reward = ["--reward.name", "unkind:killing_once", "--reward.marker", str(tmp_path / "marker")]
    words = command(folder, "--run.out", str(tmp_path / "run"), "--run.updates", "2", *reward)
    (ended,) = processes.launch(1, *LAUNCH, *words)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "marker").exists()
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_portions_cover_the_sequences_and_stay_within_their_number() -> None:
    schedule = ScaleSchedule.square((1, 2, 3, 6))
    for kind in ("full", "prefix", "suffix"):
        made = plan(kind, MethodConfig(prompts=3, group=4, middle="grid:2", continuations=2), schedule)
        rows = 3 * made.sequences
        for start, stop, at_once in [(0, rows, 0), (0, rows, 5), (2, rows - 1, 3), (5, 6, 1), (1, 10, 0)]:
            drawn = []
            for heads, tails in made.portions(range(start, stop), at_once):
                assert len(heads) == 1 or len(tails) == made.tails
                assert at_once == 0 or len(heads) == 1 or len(heads) * len(tails) <= at_once
                drawn += [head * made.tails + tail for head in heads for tail in tails]
            each = made.continuations
            assert drawn == list(range(start * each, stop * each)), (kind, start, stop, at_once)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"cpu_offload": True}, "parallel.cpu_offload True needs parallel.mode fsdp2"),
        ({"param_dtype": "bfloat16"}, "parallel.param_dtype bfloat16 needs parallel.mode fsdp2"),
        ({"timeout": 0}, "parallel.timeout must be positive"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ParallelConfig(**words)


def test_a_process_alone_shares_nothing() -> None:
    alone, rows = Distributed(), torch.arange(6.0).view(3, 2)
    assert (alone.main, alone.sharded) == (True, False)
    assert alone.share(5) == alone.portion(5) == range(5)
    assert torch.equal(alone.gather(rows), rows)
    assert alone.gather_values({"a": 1}) == [{"a": 1}]
    with alone.guarded():
        pass


def test_the_slurm_script_is_one() -> None:
    script = Path(__file__).parents[1] / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    refused = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert "usage: sbatch examples/slurm.sh RECIPE RUN_FOLDER" in refused.stderr
