"""What the tests keep to: limits of time that are for hangs only, and other processors that are told apart."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import patience
import processors

HERE = Path(__file__).parent


def test_no_test_has_a_limit_of_time_of_its_own() -> None:
    """A busy machine exceeds any that is meant for a quiet one; what rewards are allowed, ``timeout_s``, is another."""
    limit = re.compile(r"\b(timeout|deadline)=\d|\.(join|wait|communicate|exception)\(\d")
    assert all(limit.search(words) for words in ("process.join(60)", "run(words, timeout=60)", "settings(deadline=9)"))
    for path in HERE.rglob("*.py"):
        found = [] if path == Path(__file__) else [line for line in path.read_text().splitlines() if limit.search(line)]
        assert not found, f"{path.name}: wait for patience.PATIENCE instead: {found}"


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    patience.wait_for(lambda: True)
    monkeypatch.setattr(patience, "PATIENCE", 0.01)
    with pytest.raises(AssertionError, match="in vain"):
        patience.wait_for(lambda: False)


def test_a_process_that_ended_is_not_alive() -> None:
    assert patience.alive(os.getpid())
    ended = subprocess.Popen(["true"])
    patience.wait_for(lambda: not patience.alive(ended.pid))  # though nobody has waited for it
    assert ended.wait() == 0
    assert not patience.alive(ended.pid)


@pytest.mark.parametrize("code", [0, 1])
def test_numbers_are_tested_as_every_processor_that_this_one_can_be(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(env.get("ONEDNN_MAX_CPU_ISA", ""))
        failed = code if seen[-1] == "AVX2" else 0
        return subprocess.CompletedProcess(command, failed, "a test failed\n3 passed\n", "")

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(processors, "flags", lambda: {"sse4_1", "sse4_2", "avx", "avx2"})
    monkeypatch.setattr(subprocess, "run", run)
    assert processors.main() == code
    assert sorted(seen) == ["", "AVX2", "SSE41"]
    said = capsys.readouterr().out
    assert "ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX_FP16: not run, this processor lacks amx_fp16, avx512bw" in said
    assert re.search(r"^MKL_CBWR=COMPATIBLE: 3 passed \(", said, re.MULTILINE)
    assert ("a test failed" in said) == bool(code)
    assert f"pass in {3 - code} of 3 environments" in said
