"""Bits, codes and resizing; upstream's modules one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.infinity.cases import GOLDEN, difference, draw_bits, make_policy
from models.infinity.reference import reference_autoencoder
from varl.models.autoencoder import group_norm
from varl.models.infinity.bits import BitQuantizer, binarize, resize_linear
from varl.models.infinity.model import HeadNorm, TextNorm
from varl.models.quantizer import resize_area
from varl.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (2, 3), (4, 6)))


@pytest.fixture(scope="module")
def units() -> dict[str, Tensor]:
    return load_file(GOLDEN / "units.safetensors")


def test_norms_of_small_signals(units: dict[str, Tensor]) -> None:
    text, group, head = TextNorm(24, 1e-6), group_norm(64), HeadNorm(32, 1e-6)
    text.weight.data = units["rms_weight"]
    group.weight.data, group.bias.data = units["groupnorm_weight"], units["groupnorm_bias"]
    prefix = "head_nm."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in units.items() if k.startswith(prefix)})
    assert difference(text(units["rms_x"]), units["rms_out"]) < 1e-5
    assert difference(group(units["groupnorm_x"]), units["groupnorm_out"]) < 1e-5
    assert difference(head(units["head_nm_x"], units["head_nm_cond"]), units["head_nm_out"]) < 1e-5


def test_resizing(units: dict[str, Tensor]) -> None:
    x, seen = units["resize_x"].squeeze(2), 0
    for name, wanted in units.items():
        kind, _, size = name.partition("_16_to_")
        if kind in ("trilinear", "area3d"):
            resize = resize_linear if kind == "trilinear" else resize_area
            assert difference(resize(x, tuple(int(s) for s in size.split("x"))), wanted.squeeze(2)) < 2e-6
            seen += 1
    assert seen == 8


def test_signs_and_codes(units: dict[str, Tensor]) -> None:
    bits = binarize(units["bsq_z"].squeeze(2))
    assert torch.equal(bits.permute(0, 2, 3, 1).unsqueeze(1).to(torch.uint8), units["bsq_bits"])
    codes = BitQuantizer(8).codes(bits.float().flatten(2).transpose(1, 2), (2, 3))
    assert difference(codes, units["bsq_code"].squeeze(2)) < 1e-6
    assert codes.square().sum(1).sub(1).abs().max() < 1e-6


def test_patchify_has_four_cells_in_a_token() -> None:
    quantizer = BitQuantizer(3, patchify=True)
    assert (quantizer.bits, quantizer.cells((2, 3))) == (12, (4, 6))
    cells = torch.arange(3 * 4 * 6).view(1, 3, 4, 6).float()
    tokens = quantizer.to_tokens(cells)
    for token, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        for bit, (c, dy, dx) in enumerate((c, dy, dx) for c in range(3) for dy in range(2) for dx in range(2)):
            assert tokens[0, token, bit] == cells[0, c, 2 * y + dy, 2 * x + dx]
    assert torch.equal(quantizer.to_map(tokens, (2, 3)), cells)


@pytest.mark.parametrize("patchify", [False, True])
def test_the_sum_and_what_the_transformer_reads(patchify: bool) -> None:
    quantizer = BitQuantizer(4, patchify)
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(2, (2, SCHEDULE.tokens, quantizer.bits), generator=generator)
    total, inputs = quantizer.accumulate(actions, SCHEDULE, 3)
    assert [one.shape[1:] for one in inputs] == [(6, quantizer.bits), (24, quantizer.bits)]
    final = quantizer.cells((4, 6))
    assert total.shape == (2, 4, *final)
    wanted = torch.zeros_like(total)
    for step, grid in enumerate(SCHEDULE.grids):
        code = F.normalize(quantizer.to_map(2.0 * actions[:, SCHEDULE.tokens_of(step)] - 1, grid), dim=1)
        wanted += F.interpolate(code.unsqueeze(2), size=(1, *final), mode="trilinear").squeeze(2)
        if step < 2:
            size = (1, *quantizer.cells(SCHEDULE.grids[step + 1]))
            now = F.interpolate(wanted.unsqueeze(2), size=size, mode="trilinear").squeeze(2)
            assert difference(quantizer.to_map(inputs[step], SCHEDULE.grids[step + 1]), now) < 1e-6
    assert difference(total, wanted) < 1e-6
    assert difference(quantizer.accumulate(actions[:, :7], SCHEDULE)[0], total) > 0.1
    with pytest.raises(ValueError, match="8 tokens end inside a step"):
        quantizer.accumulate(actions[:, :8], SCHEDULE)


@pytest.mark.parametrize("patchify", [False, True])
def test_finer_grids_make_up_for_mistakes(patchify: bool) -> None:
    """Every grid quantizes what is left of the features by the bits that were drawn, not by those found."""
    quantizer = BitQuantizer(4, patchify)
    raw = torch.randn(2, 4, *quantizer.cells((4, 6)), generator=torch.Generator().manual_seed(0))
    labels, drawn = quantizer.encode(raw, SCHEDULE)
    assert torch.equal(labels, drawn)
    wrong, flipped = quantizer.encode(raw, SCHEDULE, lambda step, bits: 1 - bits if step == 0 else bits)
    assert torch.equal(wrong[:, :1], labels[:, :1])
    assert torch.equal(flipped[:, :1], 1 - labels[:, :1])
    assert torch.equal(wrong[:, 1:], flipped[:, 1:])
    before = quantizer.accumulate(flipped[:, :7], SCHEDULE)[0]
    found = quantizer.to_tokens(binarize(raw - before).float())
    assert torch.equal(wrong[:, 7:].float(), found)
    assert not torch.equal(wrong[:, 7:], labels[:, 7:])
    with pytest.raises(ValueError, match="do not fit a final grid"):
        quantizer.encode(raw[..., :-1], SCHEDULE)


@pytest.mark.parametrize(("patch", "mult"), [(16, (1, 1, 2, 2, 4)), (8, (1, 2, 2, 4)), (4, (2, 1, 1, 1))])
def test_the_autoencoder_is_as_the_plain_reference_has_it(patch: int, mult: tuple[int, ...]) -> None:
    policy = make_policy(codebook_dim=6, ch_mult=mult, patch_size=patch, num_res_blocks=2)
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokenizer = policy._autoencoder
    features, picture = reference_autoencoder(policy, images)
    assert features.shape == (1, 6, 32 // patch, 48 // patch)
    assert difference(tokenizer.features(images), features) < 5e-5
    assert difference(tokenizer.picture(features.float()), picture) < 5e-5
    assert tokenizer.picture(features.float() * 1000 + 30).abs().max() <= 1


def test_patchify_from_pictures_to_logits_and_back() -> None:
    policy = make_policy(apply_spatial_patchify=1, ch_mult=(1, 1, 1, 1), patch_size=8)
    assert policy.event == (16,)
    assert policy.default_schedule.image_size == (96, 64)
    images = torch.rand(1, 3, 96, 64)
    actions = policy.encode(images)
    assert actions.shape == (1, 35, 16)
    features = policy._autoencoder.features(images * 2 - 1)
    rest = features - policy.quantizer.accumulate(actions[:, :11], policy.default_schedule)[0]
    assert torch.equal(policy.quantizer.to_map(actions[:, 11:].float(), (6, 4)), (rest > 0).float())
    assert policy.decode(draw_bits(policy, 1)).shape == images.shape
