"""Text encoders on the device: small random ones, through transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.measuring import Report
from models.infinity.test_text import flan_t5
from models.switti.test_condition import parts
from varl.models.infinity.condition import TextEncoder
from varl.models.switti.condition import TextEncoders

__all__ = ["flan_t5", "parts"]

CPU = torch.device("cpu")
TEXTS = ["a cat", "a dog", "a cat"]


def test_flan_t5(flan_t5: Path, device: torch.device, report: Report) -> None:
    """In fp16; also where autocast would round otherwise, and where another device asked first."""
    expected, encoder = TextEncoder(flan_t5, 12)(TEXTS, CPU), TextEncoder(flan_t5, 12)
    with torch.autocast(device.type, torch.bfloat16):
        found = encoder(TEXTS, device)
    for one, other in zip(found, expected, strict=True):
        assert one.device == device
        report.near("text: flan-T5", one, other, 1e-2)
    assert torch.equal(encoder(TEXTS, CPU)[1], found[1].cpu())


def test_clip(parts: dict[str, Path], device: torch.device, report: Report) -> None:
    folders = (parts["text_encoder"], parts["text_encoder_2"])
    expected, encoders = TextEncoders(folders)(TEXTS, CPU), TextEncoders(folders)
    with torch.autocast(device.type, torch.bfloat16):
        found = encoders(TEXTS, device)
    for name, value in expected.items():
        assert found[name].device == device
        report.near(f"text: CLIP, {name}", found[name], value, 1e-4)
    assert torch.equal(encoders(TEXTS, CPU)["pooled"], found["pooled"].cpu())
    with pytest.raises(FileNotFoundError, match="no text encoder"):
        TextEncoders((folders[0], folders[1] / "none"))
