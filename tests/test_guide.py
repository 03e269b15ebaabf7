"""docs/guide.md: its commands are run, in order, on the stand-in that it writes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from examples import tiny_var
from PIL import Image
from safetensors.torch import load_file

from varl.cli import main

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """The words of every varl command of the guide."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["varl"]]


def picture(path: str) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


@pytest.mark.slow
def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    recipe = str(tiny_var.write(Path("checkpoints/tiny")))
    found = commands()
    assert {words[0] for words in found} == {"plan", "doctor", "generate", "evaluate", "probe", "train"}
    for words in found:
        assert main([word.replace("$RECIPE", recipe) for word in words]) == 0, words

    before, whole, lora = (picture(name) for name in ("before.png", "whole.png", "lora.png"))
    assert not np.array_equal(before, whole)
    assert not np.array_equal(before, lora)
    scores = [
        json.loads(Path(name).read_text())["metrics"]["reward"]["value"] for name in ("before.json", "after.json")
    ]
    assert scores[0] != scores[1]
    published = tiny_var.load_policy("var", tiny_var.CONFIG, "random").trainable.state_dict()
    for run in ("whole", "lora", "more", "again"):
        assert load_file(f"runs/{run}/weights.safetensors").keys() == published.keys()
    adapters = [load_file(f"runs/{run}/adapters.safetensors") for run in ("lora", "more")]
    assert adapters[0].keys() == adapters[1].keys()
    assert any((adapters[0][key] != adapters[1][key]).any() for key in adapters[0])
    assert not Path("runs/again/adapters.safetensors").exists()
