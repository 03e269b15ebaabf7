import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varl import ScaleSchedule
from varl.models.inkling.pretrain import sample_batch
from varl.models.inkling.tokenizer import Tokenizer

SCHEDULE = ScaleSchedule.square((1, 2, 3, 6, 12), 4)


def make(codes: int = 96, coarse: int = 12, fine: int = 6) -> Tokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tokenizer(SCHEDULE, codes, coarse, fine, 8).requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return sample_batch((0, 9), 96)[0]


@pytest.fixture(scope="module")
def fitted(images: Tensor) -> Tokenizer:
    tokenizer = make()
    tokenizer.fit(images, torch.Generator().manual_seed(0), rounds=6)
    return tokenizer


def test_components_are_orthonormal(fitted: Tokenizer) -> None:
    for components in (fitted.encoder.coarse, fitted.encoder.fine):
        torch.testing.assert_close(components @ components.T, torch.eye(len(components)), atol=1e-5, rtol=0)


def test_coarse_features_are_projections_of_patches(fitted: Tokenizer, images: Tensor) -> None:
    features = fitted.encoder(images[:2])
    assert features.shape == (2, 12, 12, 12)
    for row, i, j in ((0, 0, 0), (1, 3, 5)):
        # A patch as pixel_unshuffle orders it: channel, then row and column.
        patch = (images[row, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] - 0.5).reshape(-1)
        expected = fitted.encoder.coarse @ patch / 2
        for cell in features[row, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1).T:
            torch.testing.assert_close(cell, expected, atol=1e-5, rtol=0)


def test_distances_of_features_are_distances_of_pictures(images: Tensor) -> None:
    tokenizer = make(codes=2, coarse=192, fine=48)
    tokenizer.encoder.coarse[:] = torch.linalg.qr(torch.randn(192, 192)).Q
    difference = tokenizer.encoder(images[:1]) - tokenizer.encoder(images[1:2])
    assert float(difference.square().sum()) == pytest.approx(float((images[0] - images[1]).square().sum()), rel=1e-4)
    # All components leave nothing to the last grid; none leaves everything.
    assert tokenizer.encoder.missed(images[:2], tokenizer.encoder(images[:2])).abs().max() < 1e-5
    everything = tokenizer.encoder.missed(images[:2], torch.zeros(2, 192, 12, 12))
    assert torch.equal(everything, F.pixel_unshuffle(images[:2] - 0.5, 4))


def test_encode_chooses_the_nearest_code_step_by_step(fitted: Tokenizer, images: Tensor) -> None:
    found = fitted.encode(images[:3])
    assert found.shape == (3, 194)
    table = fitted.quantizer.embedding.weight
    coarse = fitted.encoder(images[:3])
    for step, (h, w) in enumerate(SCHEDULE.grids):
        before = (
            torch.zeros(3, 18, 12, 12) if step == 0 else fitted.quantizer.features(found[:, : SCHEDULE.offsets[step]])
        )
        target = torch.zeros(3, 18, 12, 12)
        if step < 4:
            target[:, :12] = coarse - before[:, :12]
        else:
            target[:, 12:] = torch.einsum(
                "dc,bchw->bdhw", fitted.encoder.fine, fitted.encoder.missed(images[:3], before[:, :12])
            )
        size = 12 // h
        for i, j in ((0, 0), (h - 1, w // 2)):
            cell = target[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size].mean((2, 3))
            assert torch.equal(torch.cdist(cell, table).argmin(1), found[:, SCHEDULE.offsets[step] + i * w + j])


def test_every_step_has_its_share_of_the_codebook(fitted: Tokenizer, images: Tensor) -> None:
    table = fitted.quantizer.embedding.weight
    assert table.isfinite().all()
    assert table.abs().max() < 100
    found = fitted.encode(images)
    # The last grid's codes have fine channels, the others coarse ones; each keeps to its own.
    fine = table[:, 12:].abs().sum(1) > 0
    assert not (fine & (table[:, :12].abs().sum(1) > 0)).any()
    assert 16 <= int(fine.sum()) <= 48
    last = SCHEDULE.tokens_of(4)
    assert fine[found[:, last]].float().mean() > 0.9
    assert fine[found[:, : last.start]].float().mean() < 0.1
    assert len(found.unique()) > 48


def test_more_steps_are_nearer(fitted: Tokenizer, images: Tensor) -> None:
    """The features of the coarse steps approach the encoder's, and the last step what they missed."""
    actions, coarse = fitted.encode(images), fitted.encoder(images)
    errors = [
        float((fitted.quantizer.features(actions[:, : SCHEDULE.offsets[s]])[:, :12] - coarse).square().mean())
        for s in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * float(coarse.square().mean())


def test_the_seed_sets_the_codebook(images: Tensor) -> None:
    one, again, other = make(), make(), make()
    for tokenizer, seed in ((one, 0), (again, 0), (other, 1)):
        tokenizer.fit(images[:32], torch.Generator().manual_seed(seed), rounds=2)
    assert torch.equal(one.quantizer.embedding.weight, again.quantizer.embedding.weight)
    assert not torch.equal(one.quantizer.embedding.weight, other.quantizer.embedding.weight)


def test_decoding_any_first_steps(fitted: Tokenizer, images: Tensor) -> None:
    actions = fitted.encode(images[:2])
    for steps in range(1, 6):
        picture = fitted.decode(actions[:, : SCHEDULE.offsets[steps]])
        assert picture.shape == (2, 3, 48, 48)
        assert picture.min() >= 0
        assert picture.max() <= 1
    with pytest.raises(ValueError, match="end inside a step"):
        fitted.decode(actions[:, :7])


def test_phi_starts_as_nothing() -> None:
    tokenizer = make()
    actions = torch.randint(96, (2, 36), generator=torch.Generator().manual_seed(0))
    codes = tokenizer.quantizer.embedding(actions).transpose(1, 2).unflatten(2, (6, 6))
    expected = codes.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(tokenizer.quantizer.contribution(actions, 3), expected)
