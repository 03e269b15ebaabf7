from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from varl.models.parts import find_parts, write_tensors

PARTS = ("transformer", "tokenizer", "text")


def test_a_folder_stands_for_the_parts_it_names(tmp_path: Path) -> None:
    """If the first part is among them: a language model's own folder has a file named tokenizer too."""
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "model.safetensors").touch()
    assert find_parts(tmp_path, PARTS, PARTS[:1], "A") == {"transformer": tmp_path}
    (tmp_path / "transformer").mkdir()
    found = {"transformer": tmp_path / "transformer", "tokenizer": tmp_path / "tokenizer.model"}
    assert find_parts(str(tmp_path), PARTS, PARTS[:2], "A") == found


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, 'A comes without weights: give local paths for transformer, tokenizer, or "random"'),
        ({"text": "here"}, "A needs weights for its transformer, tokenizer; given are text"),
        ({"vae": "here"}, "A has no part 'vae'; its parts are transformer, tokenizer, text"),
    ],
)
def test_parts_that_are_missing(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_parts(weights, PARTS, PARTS[:2], "A")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_file_is_replaced_under_tensors_that_are_mapped_from_it(tmp_path: Path, name: str) -> None:
    path, first = tmp_path / "new" / name, torch.arange(3e5)

    def read() -> torch.Tensor:
        return (load_file(path) if name.endswith("s") else torch.load(path, mmap=True, weights_only=True))["a"]

    write_tensors({"a": first}, path)
    mapped = read()
    write_tensors({"a": mapped[:1000].flip(0).contiguous()}, path)
    assert torch.equal(mapped, first)
    assert torch.equal(read(), first[:1000].flip(0))
    assert [file.name for file in path.parent.iterdir()] == [name]
