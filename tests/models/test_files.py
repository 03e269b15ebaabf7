"""Files that are not what their names say: each message is true, and good files of every age load."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from varl.adapters import read_adapters
from varl.models import load_policy
from varl.models.files import plain, read_safetensors, write_safetensors
from varl.models.weights import read_tensors

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2), "steps": torch.arange(3)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 8817341\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"
STAND_INS = {
    "empty": (b"", "it is empty"),
    "lfs": (LFS, r"it is a Git LFS pointer to the file of 8,817,341 bytes; run git lfs pull"),
    "page": (PAGE, "it is an HTML or XML page"),
    "error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is an HTML or XML page"),
}


@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "ckpt", "safetensors", "index.json"])
@pytest.mark.parametrize("case", STAND_INS)
def test_stand_ins_are_named(tmp_path: Path, case: str, ending: str) -> None:
    path = tmp_path / f"model.{ending}"
    path.write_bytes(STAND_INS[case][0])
    with pytest.raises(ValueError, match=STAND_INS[case][1]) as refused:
        read_tensors(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("case", STAND_INS)
def test_stand_ins_of_adapters_and_inkling_are_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(STAND_INS[case][0])
    for read in (lambda: read_adapters(path, "inkling"), lambda: load_policy("inkling", weights=path)):
        with pytest.raises(ValueError, match=STAND_INS[case][1]):
            read()


def test_equal_content_is_written_as_equal_bytes(tmp_path: Path) -> None:
    """With the text that JSON escapes, or not, in keys and values."""
    odd = {'é"\\\n\x01\x7f\u2028': "\U0001f600/<", "config": '{"a": 1}'} | {f"key {i}": str(i) for i in range(6)}
    for metadata in (odd, {"family": "x", "lora": "y"}, {}, None):
        written = set()
        for _ in range(8):
            write_safetensors(TENSORS, path := tmp_path / "a.safetensors", metadata)
            written.add(path.read_bytes())
        assert len(written) == 1
        tensors, found = read_safetensors(path)
        assert found == (metadata or {})
        assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


def test_legacy_files_load(tmp_path: Path) -> None:
    for name, content in {"a": TENSORS, "b": {"trainer": {"x": TENSORS}, "epoch": 1}}.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=False)
        found = read_tensors(path, [("trainer", "x")])
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.999])
def test_cut_files_are_cut_short(tmp_path: Path, legacy: bool, part: float) -> None:
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.rand(3000)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=r"a\.pth is not a whole torch file: it is cut short"):
        read_tensors(path)


class Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.folder / "executed",))


CODE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a call": (lambda folder: {"weight": Code(folder)}, "getattr"),
    "a module": (lambda folder: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "an object": (lambda folder: {"args": STAND_INN, "weight": torch.ones(2)}, r"test_files\.StandInn"),
}


class StandInn:
    pass


STAND_INN = StandInn()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", CODE)
@pytest.mark.filterwarnings("ignore")
def test_code_is_named_and_not_executed(tmp_path: Path, case: str, legacy: bool) -> None:
    make, name = CODE[case]
    torch.save(make(tmp_path), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"it names \S*{name}, which is code") as refused:
        read_tensors(tmp_path / "a.pth")
    assert str(refused.value).isprintable()
    assert not (tmp_path / "executed").exists()


def test_a_name_in_a_file_brings_no_terminal_codes(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"\x80\x02cevil\n\x1b[31mred\x1b[0m\n.")
    with pytest.raises(ValueError, match=r"it names evil\.red, which is code") as refused:
        read_tensors(tmp_path / "a.pth")
    assert str(refused.value).isprintable()


def test_files_of_the_other_kind_are_named(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"it is a torch file; let its name end in \.pth"):
        read_tensors(tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"it is a safetensors file; let its name end in \.safetensors"):
        read_tensors(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(gzip.compress(save(TENSORS)))
    with pytest.raises(ValueError, match="it is compressed; unpack it first"):
        read_tensors(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_text("Not Found")
    with pytest.raises(ValueError, match="it is a text that begins with 'Not Found'"):
        read_tensors(tmp_path / "c.pth")


def test_a_header_of_any_length_is_no_torch_file(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header: 128 looks like a pickle."""
    path = tmp_path / "a.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(0x280).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_tensors(path)["a"].tolist() == [0]


def index(folder: Path, names: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": names}))
    return path


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "x/../../a.safetensors", "a\x1b[31m.safetensors"])
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="names a shard outside its own folder") as refused:
        read_tensors(index(tmp_path / "in", {"weight": name}))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["b"]}}]
)
def test_an_index_without_a_map_is_none(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not an index of shards: it has no weight_map"):
        read_tensors(path)


def test_json_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "old.safetensors", "a": "new.safetensors"}}')
    with pytest.raises(ValueError, match=r"json gives 'a' again, 'new\.safetensors' after 'old\.safetensors'$"):
        read_tensors(path)


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.index.json"
    path.write_text("{")
    with path.open("r+b") as file:
        file.truncate(2**40)  # takes no place on the disk
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes"):
        read_tensors(path)


def test_a_tensor_stretched_over_one_number_can_be_trained(tmp_path: Path) -> None:
    from varl.models.weights import load_strict

    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    stretched: dict[str, Tensor] = {"weight": torch.ones(1).expand(2, 3), "bias": torch.zeros(2)}
    torch.save(stretched, tmp_path / "a.pth")
    load_strict(layer, read_tensors(tmp_path / "a.pth"), "here")
    with torch.no_grad():
        layer.weight[0, 0] = 5
    assert layer.weight.tolist() == [[5, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("source", [5, [], [3], 1.5, b"a"], ids=str)
def test_sources_of_another_type_are_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="weights are a path"):
        read_tensors(source)
    with pytest.raises(ValueError, match="Inkling's weights are a path"):
        load_policy("inkling", weights=source)


def test_what_files_say_fits_a_line() -> None:
    assert plain("a\x1b[1mb\x1b[0m\nc\x07") == "ab c"
    assert plain("x" * 10**6) == "x" * 200 + "..."
