"""Reading checkpoints: every kind of source, and what is said of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from varl.models.weights import load_strict, part_sources, read_tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in nn.Linear(3, 2).state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def shards(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    for key, value in tensors.items():
        save_file({key: value}, tmp_path / f"{key}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"{key}.safetensors" for key in tensors}}))
    return index


def test_every_kind_of_source_gives_the_same_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    one, torch_file, nested = tmp_path / "a.safetensors", tmp_path / "a.pth", tmp_path / "n.pt"
    save_file(tensors, one)
    torch.save(tensors, torch_file)
    torch.save({"trainer": {"gpt_fsdp": tensors}, "epoch": 3}, nested)
    (tmp_path / "sharded").mkdir()
    index = shards(tmp_path / "sharded", tensors)
    several = [index.parent / "weight.safetensors", index.parent / "bias.safetensors"]
    for source in (one, str(torch_file), tensors, index, index.parent, several):
        assert same(read_tensors(source), tensors)
    assert same(read_tensors(nested, [("vae",), ("trainer", "gpt_fsdp")]), tensors)


def test_sources_that_cannot_be_read_say_why(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*gone\.pth"):
        read_tensors(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_tensors(tmp_path)
    for name, save in (("a.safetensors", save_file), ("a.pth", torch.save)):
        save(tensors, tmp_path / name)
        (tmp_path / f"torn-{name}").write_bytes((tmp_path / name).read_bytes()[:-40])
        with pytest.raises(ValueError, match=rf"torn-{name} is not a whole"):
            read_tensors(tmp_path / f"torn-{name}")
    with pytest.raises(ValueError, match=r"bias \(2 keys in all\)"):
        read_tensors([tmp_path / "a.safetensors", tmp_path / "a.pth"])
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="'epoch' is a int"):
        read_tensors(tmp_path / "other.pth")
    (tmp_path / "sharded").mkdir()
    index = shards(tmp_path / "sharded", tensors)
    (index.parent / "bias.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="2 shards, of which 1 are missing: bias"):
        read_tensors(index)


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="plain tensors"):
        read_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_strict_loading_names_what_differs(tensors: dict[str, torch.Tensor]) -> None:
    layer = nn.Linear(3, 2)
    load_strict(layer, tensors | {"counter": torch.ones(1)}, "here", ignore=["counter"])
    assert same(dict(layer.state_dict()), tensors)
    with pytest.raises(ValueError, match=r"here do not fit: 1 of 2 keys are missing \(bias\)"):
        load_strict(layer, {"weight": tensors["weight"]}, "here")
    with pytest.raises(ValueError, match=r"2 of 4 keys are not this model's \(x, y\)"):
        load_strict(layer, tensors | {"x": torch.ones(1), "y": torch.ones(1)}, "here")
    with pytest.raises(ValueError, match=r"1 shapes differ \(weight is \[2, 4\], not \[2, 3\]\)"):
        load_strict(layer, tensors | {"weight": torch.ones(2, 4)}, "here")


def test_a_module_on_meta_takes_the_tensors(tensors: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    load_strict(layer, {key: value.half() for key, value in tensors.items()}, "here")
    assert layer.weight.dtype == torch.float32
    assert torch.allclose(layer.weight, tensors["weight"], atol=1e-3)


@pytest.mark.parametrize("kind", ["zip", "legacy", "given"])
def test_what_shares_memory_is_loaded_apart(tmp_path: Path, kind: str) -> None:
    """Tied tensors, views of one tensor and a stretched one: a step on one would be taken on the others too."""
    whole = torch.arange(12.0).view(3, 4)
    tied = {"0.weight": whole[:2, :2], "0.bias": whole[0, :2], "1.weight": whole[1:, 1:3][:2], "1.bias": whole[0, :2]}
    tied |= {"2.weight": torch.ones(1, 1).expand(2, 2), "2.bias": torch.ones(1).expand(2)}
    values = {key: value.clone() for key, value in tied.items()}
    if kind != "given":
        torch.save(tied, tmp_path / "tied.pth", _use_new_zipfile_serialization=kind == "zip")
        tied = read_tensors(tmp_path / "tied.pth")
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    load_strict(layers, tied, "here")
    assert same(dict(layers.state_dict()), values)
    for number, parameter in enumerate(layers.parameters()):
        parameter.data.fill_(number)
    assert [value.unique().tolist() for value in layers.parameters()] == [[number] for number in range(6)]


def test_the_parts_of_a_family(tensors: dict[str, torch.Tensor]) -> None:
    parts = ("transformer", "tokenizer")
    assert part_sources("a.pth", parts, "VAR") == {"transformer": "a.pth"}
    assert part_sources({"tokenizer": "b.pth"}, parts, "VAR") == {"tokenizer": "b.pth"}
    assert part_sources(tensors, parts, "VAR") == {"transformer": tensors}
    with pytest.raises(ValueError, match="VAR has no part 'vae'; its parts are transformer, tokenizer"):
        part_sources({"vae": "b.pth"}, parts, "VAR")
