import pytest
import torch

from varl import schedule
from varl.algorithm import scale_weights, step_shares, token_weights

SIDES_1024 = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64]
COUNTS = [1, 4, 16]


@pytest.mark.parametrize(("alpha", "share"), [(0.0, 0.91), (0.6, 0.65), (1.0, 0.33)])
def test_the_last_six_steps_at_1024_hold_the_stated_share(alpha, share):
    table = schedule.ScaleSchedule.square(SIDES_1024)
    assert table.tokens == 10_084
    shares = step_shares(table.counts, alpha)
    assert shares.sum().item() == pytest.approx(1.0)
    assert shares[-6:].sum().item() == pytest.approx(share, abs=0.005)
    # The same from the token weights, which is what the loss uses.
    weights = token_weights(table.counts, alpha, dtype=torch.float64)
    assert weights[table.offsets[-7] :].sum().item() == pytest.approx(shares[-6:].sum().item())


def test_k_is_the_count_to_the_power_of_minus_alpha():
    assert scale_weights(COUNTS, 0.5).tolist() == [1.0, 0.5, 0.25]
    assert scale_weights(COUNTS, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert scale_weights([9], 1.0).item() == pytest.approx(1 / 9)


def test_alpha_0_is_the_token_mean_and_alpha_1_the_mean_of_step_means():
    losses = torch.randn(21, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((token_weights(COUNTS, 0.0) * losses).sum(), losses.mean())
    steps = torch.stack([step.mean() for step in losses.split(COUNTS)])
    torch.testing.assert_close((token_weights(COUNTS, 1.0) * losses).sum(), steps.mean())


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 1.2])
def test_weights_sum_to_one_and_unscaled_ones_are_k(alpha):
    weights = token_weights(COUNTS, alpha)
    assert weights.shape == (21,)
    assert weights.sum().item() == pytest.approx(1.0)
    k = scale_weights(COUNTS, alpha)
    raw = token_weights(COUNTS, alpha, rescale=False)
    torch.testing.assert_close(raw, torch.cat([k[t].expand(n) for t, n in enumerate(COUNTS)]))
    torch.testing.assert_close(raw / raw.sum(), weights)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("rescale", [True, False])
def test_masked_counts_equal_a_plain_loop(alpha, rescale):
    mask = (torch.rand(5, 21, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    mask[3, 5:] = 0  # no token of the last step
    mask[4] = 0  # none at all
    got = token_weights(COUNTS, alpha, rescale=rescale, mask_BL=mask, count="masked")
    for b in range(5):
        n = [int(part.sum()) for part in mask[b].split(COUNTS)]
        k = [x**-alpha if x else 0.0 for x in n]
        total = sum(k_t * n_t for k_t, n_t in zip(k, n, strict=True)) if rescale else 1.0
        expected = [k[t] / total if total else 0.0 for t, c in enumerate(COUNTS) for _ in range(c)]
        torch.testing.assert_close(got[b], torch.tensor(expected))
    if rescale:
        torch.testing.assert_close((got * mask).sum(1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


def test_a_full_mask_counts_the_grid_and_the_grid_ignores_the_mask():
    full = torch.ones(2, 21)
    torch.testing.assert_close(token_weights(COUNTS, mask_BL=full, count="masked"), token_weights(COUNTS).expand(2, 21))
    assert torch.equal(token_weights(COUNTS, mask_BL=0 * full), token_weights(COUNTS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_weights([]), "at least one step"),
        (lambda: scale_weights([4, 0]), "each at least 1"),
        (lambda: step_shares([4], float("nan")), "alpha"),
        (lambda: token_weights([4], count="some"), "count must be one of"),
        (lambda: token_weights([4], count="masked"), "needs mask_BL"),
        (lambda: token_weights([4], count="masked", mask_BL=torch.ones(2, 5)), "batch, 4"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
