import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import varl
from small import SMALL, make_inkling
from varl.models import save_policy
from varl.models.inkling import Inkling, checkpoint


@pytest.fixture
def saved(tmp_path: Path, inkling: Inkling) -> Path:
    save_policy(inkling, tmp_path / "new" / "inkling.safetensors")
    return tmp_path / "new" / "inkling.safetensors"


def same(a: Inkling, b: Inkling) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_there_and_back(saved: Path, inkling: Inkling) -> None:
    for weights in (saved, str(saved), {"model": saved}, {"model": str(saved)}):
        loaded = varl.load_policy("inkling", weights=weights)
        assert loaded.config == SMALL
        assert same(loaded, inkling)
        assert not loaded.training


def test_a_state_dict(inkling: Inkling) -> None:
    loaded = varl.load_policy("inkling", asdict(SMALL), {"model": inkling.state_dict()})
    assert same(loaded, inkling)


def test_half_the_size(tmp_path: Path, saved: Path, inkling: Inkling) -> None:
    small = tmp_path / "half.safetensors"
    checkpoint.save(inkling, small, torch.float16)
    assert small.stat().st_size < 0.6 * saved.stat().st_size
    loaded = varl.load_policy("inkling", weights=small)
    for key, value in inkling.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.half().float())


def test_weights_in_other_memory_formats(tmp_path: Path) -> None:
    policy = make_inkling()
    policy.tokenizer.to(memory_format=torch.channels_last)
    save_policy(policy, tmp_path / "a.safetensors")
    assert same(varl.load_policy("inkling", weights=tmp_path / "a.safetensors"), policy)


def test_random_weights() -> None:
    policy = varl.load_policy("inkling", asdict(SMALL), "random")
    assert policy.config == SMALL


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_truncated_file(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        varl.load_policy("inkling", weights=saved)


def test_some_other_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights here, but a text that is long enough to be one")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        varl.load_policy("inkling", weights=tmp_path / "notes.txt")


@pytest.mark.parametrize("metadata", [None, {"family": "infinity"}, {"made by": "hand"}])
def test_weights_of_another_family(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata=metadata)
    name = (metadata or {}).get("family", "an unnamed family")
    with pytest.raises(ValueError, match=f"holds weights of {name}, not Inkling"):
        varl.load_policy("inkling", weights=tmp_path / "a.safetensors")


@pytest.mark.parametrize("config", [None, "{", json.dumps({"colour": 3}), "[1, 2]"])
def test_a_shape_that_cannot_be_read(tmp_path: Path, config: str | None) -> None:
    metadata = {"family": "inkling"} | ({} if config is None else {"config": config})
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="shape"):
        varl.load_policy("inkling", weights=tmp_path / "a.safetensors")


def test_weights_of_another_shape(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"do not fit: \d+ shapes differ \(transformer\.\S+ is \[.*\], not \["):
        varl.load_policy("inkling", {"width": 64}, saved)
    with pytest.raises(ValueError, match=r"\d+ of \d+ keys are missing \(transformer\.blocks\.2\."):
        varl.load_policy("inkling", {"depth": 3}, saved)
    with pytest.raises(ValueError, match=r"\d+ of \d+ keys are not this model's \(transformer\.blocks\.1\."):
        varl.load_policy("inkling", {"depth": 1}, saved)


def test_an_unknown_setting() -> None:
    with pytest.raises(ValueError, match="'colour'"):
        varl.load_policy("inkling", {"colour": 3}, "random")


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Inkling weights at"):
        varl.load_policy("inkling", weights=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no Inkling weights at"):
        varl.load_policy("inkling", weights=tmp_path)
    with pytest.raises(ValueError, match="one part, 'model'"):
        varl.load_policy("inkling", weights={"tokenizer": {}})
    with pytest.raises(ValueError, match=r"no model family 'dall-e'; there are .*inkling"):
        varl.load_policy("dall-e")
