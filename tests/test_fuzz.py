"""Input of strangers: recipes, prompt files, checkpoints, pictures. No traceback but our errors, and no hang.

VARL_FUZZ is how many inputs each test tries (20 by default).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tiny_runs
from patience import PATIENCE
from varl import cli
from varl.adapters import load_adapters
from varl.models import load_policy
from varl.models.weights import read_tensors
from varl.policy import Prompt
from varl.prompts import load_prompts, quoted_words, resolve_prompts
from varl.rewards.engine import OcrEngine, Unread
from varl.rewards.python import PythonReward
from varl.run.checkpoint import Checkpoints, Damaged, read_manifest
from varl.run.gallery import save_gallery
from varl.run.metrics import MetricsWriter
from varl.schedule import ScaleSchedule

COUNT = int(os.environ.get("VARL_FUZZ", "20"))
# One file is written over and over.
fuzz = settings(
    max_examples=COUNT,
    deadline=timedelta(seconds=PATIENCE),
    derandomize="VARL_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
few = settings(fuzz, max_examples=max(COUNT // 2, 5))

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
scalars |= st.sampled_from(["", "null", "../x", "a:b", "grid:6", "!!python/object:os.system", "\ud800", "1e999", "&a"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DEEP = "[" * 100_000


def changed(data: bytes, edits: list[tuple[int, int]], cut: int | None) -> bytes:
    """Some bytes replaced, and perhaps the end cut off."""
    found = bytearray(data)
    for at, byte in edits:
        found[at % len(found)] = byte
    return bytes(found if cut is None else found[: cut % len(found)])


edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6)
cuts = st.none() | st.integers(0, 2**20)


# --- Recipes ---


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bytes], int]:
    """``varl train`` of a recipe, up to where its work would start; its exit code."""

    def run(config: Any) -> int:
        assert isinstance(config.run.out, Path)
        return 0

    run.__doc__ = "Train."
    monkeypatch.setitem(cli.COMMANDS, "train", replace(cli.COMMANDS["train"], run=run))
    path = tmp_path / "recipe.yaml"

    def command(recipe: bytes) -> int:
        path.write_bytes(recipe)
        try:
            return cli.main(["train", str(path)])
        except SystemExit as end:
            return int(end.code or 0)

    return command


SECTIONS = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "inkling-ocr.yaml").read_text())
places = st.sampled_from(
    [(section, key) for section, own in SECTIONS.items() for key in [None, *own, "unknown", "config", 1]]
)


@pytest.mark.slow
@fuzz
@given(place=places, value=values)
def test_a_setting_of_any_value(command: Callable[[bytes], int], place: tuple[str, Any], value: Any) -> None:
    section, key = place
    recipe = SECTIONS | {section: value if key is None else SECTIONS[section] | {key: value}}
    assert command(yaml.safe_dump(recipe).encode("utf-8", "surrogatepass")) in (0, 2)


@pytest.mark.slow
@fuzz
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_recipe_of_any_bytes(command: Callable[[bytes], int], recipe: bytes) -> None:
    assert command(recipe) in (0, 2)


BOMB = "\n".join(["policy:", "  config:", "    a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
])  # fmt: skip
HOSTILE = {
    "code": "run: !!python/object/apply:os.system [touch hacked]",
    "a bomb": BOMB,
    "itself": "&a {run: *a}",
    "depth": DEEP,
    "another file": "config: /etc/passwd",
    "nothing where a value must be": "run: {out: null}",
    "nothing where a section must be": "policy: null",
    "nothing in a number": "run: {updates: null}",
    "a null byte": "run: {out: 'a\0b'}",
    "another encoding": "run: {out: é}".encode("latin-1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_recipes(
    command: Callable[[bytes], int], capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    text = HOSTILE[case]
    assert command(text if isinstance(text, bytes) else text.encode()) == 2
    assert "error:" in capsys.readouterr().err
    assert not Path("hacked").exists()


# --- Prompt files ---


def prompts_of(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        prompts = load_prompts(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    for prompt in prompts:
        assert prompt.text.strip() or prompt.label is not None
        repr(prompt).encode()


@fuzz
@given(ending=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]), content=st.binary(max_size=200))
@example(ending="csv", content=b'text\n"' + b"a" * 200_000 + b'"')
@example(ending="csv", content=b"text,words\na," + DEEP.encode())
@example(ending="json", content=DEEP.encode())
@example(ending="jsonl", content=b'{"text": "a", "label": ' + b"9" * 5000 + b"}")
@example(ending="json", content=b'{"data_list": [{"prompt": "\\ud800"}]}')
def test_a_prompt_file_of_any_bytes(tmp_path: Path, ending: str, content: bytes) -> None:
    prompts_of(tmp_path / f"prompts.{ending}", content)


@fuzz
@given(st.dictionaries(st.sampled_from(["text", "words", "boxes", "label", "other"]), values, max_size=4))
@example({"text": "a", "boxes": [[0, 0, float("nan"), 1]], "words": ["b"]})
@example({"label": 10**30})
@example({"text": "a", "words": ["\ud800"]})
def test_a_prompt_of_any_values(tmp_path: Path, entry: dict[str, Any]) -> None:
    prompts_of(tmp_path / "prompts.jsonl", json.dumps(entry).encode())
    prompts_of(tmp_path / "prompts.json", json.dumps({"data_list": [{"prompt": entry.get("text")}, entry]}).encode())


PAIRS = ["''", '""', "“”", "‘’", "„“", "«»", "»«", "‹›", "「」", "『』"]
FILLERS = [" a sign ", " the dogs' bowl, ", " don't ", " rock 'n' roll ", ' 12" wide, ', " 5'10\" tall, ", " '90s "]
phrases = st.lists(st.text("ABÉ", min_size=1, max_size=4), min_size=1, max_size=2).map(" ".join)


@settings(fuzz, max_examples=5 * COUNT)
@given(st.lists(st.tuples(st.sampled_from(FILLERS), st.sampled_from(PAIRS), phrases), max_size=6))
def test_what_is_quoted_comes_back(parts: list[tuple[str, str, str]]) -> None:
    text = "".join(f"{filler}{pair[0]}{phrase}{pair[1]}" for filler, pair, phrase in parts)
    assert quoted_words(text + " end") == tuple(phrase for _, _, phrase in parts)


@settings(fuzz, max_examples=20 * COUNT)
@given(st.text("ab0s '\"“”‘’„«»\n\té_-", max_size=30))
def test_quotes_of_any_text(text: str) -> None:
    for word in quoted_words(text):
        assert word == word.strip() != ""
        assert word in text


@pytest.mark.parametrize("unit", [" 'a", " \"'a", " ‘a", "“ 'c’ \"", "\n'a ", " 'a' 'b"])
def test_quotes_without_end_take_no_time(unit: str) -> None:
    started = time.process_time()
    quoted_words(unit * 30_000)
    assert time.process_time() - started < 60  # of this process; with the square of the length: minutes


def test_endless_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels go up to 999999"):
        resolve_prompts("labels:0-99999999999")


# --- Checkpoints ---


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Whole files of each kind."""
    folder = tmp_path_factory.mktemp("files")
    weights = tiny_runs.tiny_weights(folder / "a.safetensors")
    torch.save({"a": torch.rand(3, 2), "b": {"c": torch.arange(4)}}, folder / "a.pth")
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    checkpoints.save(1, {"a": torch.rand(3)}, {"best": None, "x": [1.5]}, None)
    checkpoints.wait()
    manifest = next(folder.rglob("manifest.json"))
    names = {"safetensors": weights, "pth": folder / "a.pth", "manifest": manifest}
    return {name: path.read_bytes() for name, path in names.items()}


def header(tensors: Any, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def weights_of(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for read in (lambda: read_tensors(path), lambda: load_policy("inkling", weights=path)):
        try:
            read()
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


@fuzz
@given(edits=edits, cut=cuts)
def test_weights_with_bytes_changed(tmp_path: Path, files: dict[str, bytes], edits: Any, cut: int | None) -> None:
    content = files["safetensors"]
    size = int.from_bytes(content[:8], "little") + 8  # the header is where it can hurt
    weights_of(tmp_path / "a.safetensors", changed(content[:size], edits, None) + content[size:][:cut])


ENTRY = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "other"]), values, max_size=4)
ENTRY |= st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "X"]),
    "shape": st.lists(st.integers(-1, 2**62), max_size=3),
    "data_offsets": st.lists(st.integers(-1, 2**62), min_size=2, max_size=2),
})  # fmt: skip


@fuzz
@given(
    tensors=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY | values, max_size=3),
    data=st.binary(max_size=32),
)
def test_weights_with_any_header(tmp_path: Path, tensors: dict[str, Any], data: bytes) -> None:
    weights_of(tmp_path / "a.safetensors", header(tensors, data))


sizes = st.sampled_from(["width", "depth", "heads", "codes", "grids", "decoder", "coarse", "fine", "unknown"])


@fuzz
@given(shape=st.dictionaries(sizes, st.integers(-1, 2**40) | st.lists(st.integers(0, 24), max_size=4) | values))
@example(shape={"width": 2**14})
@example(shape={"depth": 10**9})
@example(shape={"heads": 0})
@example(shape={"grids": [1, 2, 2**30, 12]})
@example(shape={"grids": [1] * 100_000 + [12]})
def test_weights_that_claim_any_shape(tmp_path: Path, shape: dict[str, Any]) -> None:
    """The memory for it is taken only if the file holds it."""
    about = {"family": "inkling", "config": json.dumps(shape)}
    weights_of(tmp_path / "a.safetensors", header({"__metadata__": about}))


@fuzz
@given(edits=edits, cut=cuts)
def test_torch_files_with_bytes_changed(tmp_path: Path, files: dict[str, bytes], edits: Any, cut: int | None) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(changed(files["pth"], edits, cut))
    try:
        read_tensors(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017


@fuzz
@given(content=st.binary(max_size=200))
def test_files_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    for ending in ("pth", "safetensors", "index.json", "bin"):
        path = tmp_path / f"a.{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_tensors(path)


@few
@given(about=st.dictionaries(st.sampled_from(["rank", "alpha", "targets", "other"]), values, max_size=4) | values)
@example(about={"rank": 10**9, "alpha": 1.0, "targets": ["qkv"]})
def test_adapters_of_any_description(tmp_path: Path, about: Any) -> None:
    pytest.importorskip("peft")
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(header({"__metadata__": {"family": "inkling", "lora": json.dumps(about)}}))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_adapters(load_policy("inkling", tiny_runs.SHAPE, "random"), path)


@fuzz
@given(edits=edits.filter(bool), cut=cuts)
def test_manifests_with_bytes_changed(tmp_path: Path, files: dict[str, bytes], edits: Any, cut: int | None) -> None:
    content = changed(files["manifest"], edits, cut)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(Damaged):
        read_manifest(tmp_path)


@fuzz
@given(values | st.dictionaries(st.sampled_from(["sha256", "format", "files", "values", "update", "best"]), values))
def test_manifests_of_any_values(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged):
        read_manifest(tmp_path)


@fuzz
@given(st.lists(values.map(json.dumps).map(str.encode) | st.binary(max_size=20), max_size=4).map(b"\n".join))
@example(DEEP.encode() + b"\n{}\n")
def test_metrics_of_any_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    try:
        MetricsWriter(tmp_path, tensorboard=False)
    except ValueError as error:
        assert "metrics.jsonl, line" in str(error)  # noqa: PT017


# --- Pictures, and what rewards say of them ---


@pytest.mark.slow
@few
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(["noise", "nan", "huge", "flat"])
)
def test_pictures_of_any_size_and_content(height: int, width: int, seed: int, kind: str) -> None:
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    picture = {"noise": picture, "nan": picture / 0 * 0, "huge": picture * 1e30, "flat": picture * 0}[kind]
    (reading,) = OcrEngine().read(picture)
    assert isinstance(reading, Unread | list)


@few
@given(st.lists(st.tuples(values, values, values), min_size=2, max_size=2))
def test_rewards_that_say_anything_end_no_run(tmp_path: Path, said: list[tuple[Any, Any, Any]]) -> None:
    def reward(images: torch.Tensor, prompts: list[Prompt]) -> Any:
        output = tiny_runs.score(images, prompts)
        output.regions, output.texts, output.parts = ([s[i] for s in said] for i in range(3))  # type: ignore
        return output if said[0][0] is not None else said

    pictures, prompts = torch.rand(2, 3, 48, 48), [Prompt("'a'", ("a",)), Prompt("'b'", ("b",))]
    output = PythonReward(reward)(pictures, prompts)
    assert output.failed.shape == (2,)
    schedule = ScaleSchedule.square((3, 6), 8)
    save_gallery(tmp_path / "a.png", prompts, pictures, output.score, None, output.texts, None, schedule)
    assert np.isnan(output.score[output.failed].numpy()).all()
