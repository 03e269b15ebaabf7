"""Which device is chosen, and what is said where its memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_runs
from gpu.measuring import Report
from gpu.pairs import Pair, every
from test_trainer import make_config
from varl import log_probs
from varl.distributed import Distributed
from varl.errors import RunError, naming_memory, out_of_memory
from varl.loading import choose_device
from varl.trainer import LOWER, Trainer
from varl.transfer import Returning, read, sent

REMEDY = "lower run.micro_batch"


def test_devices_by_name(device: torch.device) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    if device.type == "cpu":
        with pytest.raises(ValueError, match="torch sees no GPU" if not torch.cuda.is_available() else "only"):
            choose_device("cuda:99")
        return
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="the device is cuda:99, but there are only"):
        choose_device("cuda:99")
    for name in ("cuda", "cuda:0"):
        assert Distributed(device=choose_device(name)).device == torch.device("cuda", 0)
        assert torch.cuda.current_device() == 0


def test_memory_that_runs_out_is_named(device: torch.device) -> None:
    """On a GPU by asking for 16 TB of it; the CPU's own error is tried in the rehearsal."""
    shape = (2**42,) if device.type == "cuda" else (2**56,)
    with pytest.raises(RunError, match=f"out of memory.*{REMEDY}") as caught, naming_memory(REMEDY):
        torch.empty(shape, dtype=torch.float32, device=device)
    assert out_of_memory(caught.value.__cause__)  # type: ignore[arg-type]
    # The device goes on working.
    assert float(torch.ones(3, device=device).sum()) == 3


@pytest.mark.parametrize("stage", ["rollout", "decode", "backward"])
def test_a_stage_without_memory_says_what_to_lower(stage: str, tmp_path: Path, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the CPU's memory may be promised without being there")
    weights = tiny_runs.tiny_weights(tmp_path / "tiny.safetensors")
    trainer = Trainer(make_config(weights, tmp_path / "run", run={"device": str(device)}))
    remedy = LOWER.get(stage, LOWER["update"])[:30]
    with pytest.raises(RunError, match=remedy), trainer.stage(stage):
        torch.empty(2**42, device=device)
    trainer.step()
    trainer.folder.close()


def test_numbers_on_their_way(device: torch.device) -> None:
    """Sent and brought back through pinned memory, one after the other, they are the same."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(5, 1000 + i, generator=generator) for i in range(20)]
    there = [sent(tensor, device) for tensor in given]
    assert all(tensor.device == device for tensor in there)
    back = Returning()
    for tensor in there:
        back.add(tensor[:, :1000] * 2)
    del there
    torch.empty(10**6, device=device).fill_(7)  # memory that was let go is written anew
    assert torch.equal(back.all(), torch.cat([tensor[:, :1000] * 2 for tensor in given]))
    flags, number = sent(torch.tensor([True, False]), device), sent(torch.tensor(3), device)
    assert [value.tolist() for value in read([flags, number, number + 0.5])] == [[1, 0], 3, 3.5]


@every
def test_all_tensors_of_a_policy_are_on_the_device(pair: Pair, report: Report) -> None:
    """Those of its state, of conditions, and of what it computes once and keeps."""
    condition = pair.there.condition(pair.prompts(2))
    log_probs(pair.there, condition, pair.actions(2).to(pair.device))
    tensors = [*pair.there.parameters(), *pair.there.buffers()]  # type: ignore[attr-defined]
    tensors += [*condition.features.values(), *condition.null.values()]
    assert {tensor.device for tensor in tensors} == {pair.device}
    if pair.device.type == "cuda":
        held = torch.cuda.memory_allocated()
        for _ in range(3):
            log_probs(pair.there, condition, pair.actions(2).to(pair.device))
        report.facts[f"bytes held after scoring again, {pair.name}"] = torch.cuda.memory_allocated() - held
        assert torch.cuda.memory_allocated() <= held
