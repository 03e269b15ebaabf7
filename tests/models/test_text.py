"""Text encoders in folders: whole ones of the right kind, read quietly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.switti.test_condition import save_encoder
from varl.models.text import load_text

transformers = pytest.importorskip("transformers")
CLIP = ("text encoder", "switti", "CLIPTokenizer", "CLIPTextModel")


def test_the_text_half_of_a_published_clip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Published folders hold pictures' weights too; no notice is printed about them."""
    save_encoder(tmp_path / "text", 8, "!")
    alone = load_text(tmp_path / "text", *CLIP)
    text = alone[1].config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16, "projection_dim": 8}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=8)
    )
    whole.text_model.load_state_dict(getattr(alone[1], "text_model", alone[1]).state_dict())
    save_encoder(tmp_path / "whole", 8, "!")
    whole.save_pretrained(tmp_path / "whole")
    capfd.readouterr()
    tokenizer, model = load_text(tmp_path / "whole", *CLIP)
    assert "".join(capfd.readouterr()) == ""
    ids = tokenizer(["a cat"], return_tensors="pt").input_ids
    assert torch.equal(model(ids).last_hidden_state, alone[1](ids).last_hidden_state)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN or infinity"), (torch.int8, "is I8, not F64")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    save_encoder(tmp_path / "clip", 8, "!")
    path = tmp_path / "clip" / "model.safetensors"
    state = load_file(path)
    key = next(key for key in state if key.endswith("fc1.weight"))
    state[key] = state[key].to(value) if isinstance(value, torch.dtype) else state[key].fill_(value)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as refused:
        load_text(tmp_path / "clip", *CLIP)
    assert "fc1.weight" in str(refused.value)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text encoder at .*none: a local folder is needed"):
        load_text(tmp_path / "none", *CLIP)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no text encoder that transformers can read as CLIPTokenizer"):
        load_text(tmp_path / "empty", *CLIP)
    save_encoder(tmp_path / "clip", 8, "!")
    with pytest.raises(
        ValueError, match=r"clip holds no text encoder .*T5EncoderModel: \d+ of its weights are missing"
    ):
        load_text(tmp_path / "clip", "text encoder", "infinity", "AutoTokenizer", "T5EncoderModel")
    for file in (tmp_path / "clip").glob("tokenizer*"):
        file.unlink()
    words = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    words |= {f"word{i}</w>": len(words) + i for i in range(3)}
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=r"its tokenizer has 58 pieces, its weights 55"):
        load_text(tmp_path / "clip", *CLIP)
