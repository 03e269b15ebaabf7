import math
from typing import Any

import pytest
import torch

import varl.sampling
from varl.sampling import Sampling, draw, filter_logits


def kept(logits: list[float], **options: float) -> list[int]:
    filtered = filter_logits(torch.tensor(logits), Sampling(**options))
    return filtered.isfinite().nonzero().flatten().tolist()


PROBABILITIES = [0.05, 0.4, 0.1, 0.3, 0.15]
LOGITS = [math.log(p) for p in PROBABILITIES]


def test_plain_sampling_changes_nothing() -> None:
    logits = torch.randn(3, 4, 7)
    assert Sampling().is_plain
    assert torch.equal(filter_logits(logits, Sampling()), logits)
    for changed in (
        Sampling(guidance=1),
        Sampling(top_k=2),
        Sampling(top_p=0.9),
        Sampling(temperature=0.5),
    ):
        assert not changed.is_plain


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_top_k(k: int, expected: list[int]) -> None:
    assert kept(LOGITS, top_k=k) == expected


def test_top_k_keeps_ties_with_the_last() -> None:
    assert kept([0.0, 2.0, 1.0, 1.0, 1.0], top_k=2) == [1, 2, 3, 4]


def test_top_k_of_more_classes_than_there_are() -> None:
    with pytest.raises(ValueError, match="top_k is 6, but there are only 5"):
        kept(LOGITS, top_k=6)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.86, [1, 2, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, expected: list[int]) -> None:
    assert kept(LOGITS, top_p=p) == expected


def test_top_p_always_keeps_the_largest() -> None:
    assert kept([0.0] * 8, top_p=1e-9) == [7] or len(kept([0.0] * 8, top_p=1e-9)) == 1
    assert kept([0.0, 30.0, 0.0], top_p=1e-9) == [1]


def test_top_p_is_of_what_top_k_left_at_the_temperature() -> None:
    # Of 0.4 and 0.3 the first alone holds 0.571; of all classes, 0.4.
    assert kept(LOGITS, top_k=2, top_p=0.55) == [1]
    assert kept(LOGITS, top_p=0.55) == [1, 3]
    # At temperature 1/2 probabilities are squared: 0.16 of 0.285 is 0.561.
    assert kept(LOGITS, temperature=0.5, top_p=0.55) == [1]


def test_temperature_divides() -> None:
    logits = torch.tensor(LOGITS)
    torch.testing.assert_close(filter_logits(logits, Sampling(temperature=0.5)), logits * 2)


def test_filters_work_row_by_row() -> None:
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(top_k=5, top_p=0.8, temperature=1.3)
    filtered = filter_logits(logits, sampling)
    for index in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
        assert torch.equal(filtered[tuple(index)], filter_logits(logits[tuple(index)], sampling))


@pytest.mark.parametrize("top_k", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_of_the_classes_that_top_k_left(top_k: int, top_p: float) -> None:
    """The short way, over k sorted values, keeps what sorting all classes keeps."""
    logits = 2 * torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    kth = logits.sort(-1).values[:, 9 - top_k, None]
    left = logits.masked_fill(logits < kth, -torch.inf)
    torch.testing.assert_close(
        filter_logits(logits, Sampling(top_k=top_k, top_p=top_p)), filter_logits(left, Sampling(top_p=top_p))
    )


def test_ties_behind_the_kth_class_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert filter_logits(logits, Sampling(top_k=2, top_p=0.99)).isfinite().tolist() == [
        [False, True, True, True, False]
    ]


def test_frequencies_are_the_softmax() -> None:
    draws = 40_000
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, -math.inf, 1.0])
    drawn = draw(logits.expand(1, draws, 6), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=6).double()
    expected = logits.double().softmax(0) * draws
    assert counts[4] == 0
    chi_square = ((counts - expected).square() / expected)[[0, 1, 2, 3, 5]].sum()
    assert chi_square < 18.5  # the 99.9% quantile of 4 degrees of freedom


def test_positions_are_drawn_independently() -> None:
    pairs = draw(torch.zeros(20_000, 2, 2), torch.Generator().manual_seed(1))
    joint = torch.bincount(2 * pairs[:, 0] + pairs[:, 1], minlength=4) / len(pairs)
    torch.testing.assert_close(joint, torch.full((4,), 0.25), atol=0.012, rtol=0)


def test_seeded_draws_repeat() -> None:
    logits = torch.randn(3, 5, 11)
    first = draw(logits, torch.Generator().manual_seed(4))
    assert torch.equal(first, draw(logits, torch.Generator().manual_seed(4)))
    assert not torch.equal(first, draw(logits, torch.Generator().manual_seed(5)))
    torch.manual_seed(6)
    first = draw(logits)
    torch.manual_seed(6)
    assert torch.equal(first, draw(logits))


def test_a_rows_draws_depend_on_its_own_generator_only() -> None:
    logits = torch.randn(4, 5, 11)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    together = draw(logits, generators(0, 1, 2, 3))
    assert torch.equal(together[2:3], draw(logits[2:3], generators(2)))
    assert torch.equal(together[[3, 1]], draw(logits[[3, 1]], generators(3, 1)))


def test_generators_must_be_one_a_row() -> None:
    with pytest.raises(ValueError, match="2 generators were given for 3 rows"):
        draw(torch.zeros(3, 1, 2), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1.0, 2)])
def test_no_number_draws_an_excluded_class(uniform: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, **_: self.fill_(uniform))
    logits = torch.tensor([[[-math.inf, 1.0, 3.0, -math.inf]]])
    assert draw(logits, torch.Generator()).item() == expected


def test_a_sum_that_steps_up_at_an_excluded_class_does_not_draw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unordered(p: torch.Tensor, _: int) -> torch.Tensor:
        return torch.tensor([[0.0, 0.25, 0.5, 1.0]])

    monkeypatch.setattr(torch.Tensor, "cumsum", unordered)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, **_: self.fill_(0.3))
    assert draw(torch.tensor([[-math.inf, 1.0, -math.inf, 3.0]]), torch.Generator()).item() == 3


def test_the_number_that_is_drawn_picks_the_class() -> None:
    """Class i for numbers from the sum of the classes before it up to its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    uniform = torch.stack([torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in range(50)])
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = (uniform.unsqueeze(-1) >= torch.tensor([0.1, 0.3, 0.6])).sum(-1)
    assert torch.equal(draw(p.log().expand(50, 3, 4), generators), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_draws_of_any_dtype(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 100.0, 0.0]], dtype=dtype)
    assert draw(logits, torch.Generator().manual_seed(0)).tolist() == [1]


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": -0.1},
        {"guidance": math.nan},
        {"guidance": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
    ],
)
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.7}])
def test_some_positions_at_a_time_are_as_all_at_once(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several rows and events, with ties and without."""
    logits = 3 * torch.randn(3, 7, 2, 11, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = logits[:, ::2].round()
    found = []
    for at_once in (varl.sampling.LOGITS, 40):
        monkeypatch.setattr(varl.sampling, "LOGITS", at_once)
        kept = filter_logits(logits, Sampling(**options, temperature=0.9))
        found.append((kept, draw(kept, [torch.Generator().manual_seed(row) for row in range(3)])))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].shape == (3, 7, 2)


@pytest.mark.parametrize("waits", [True, False], ids=["host", "device"])
def test_ties_are_told_apart_as_where_all_classes_are_sorted(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where it may look whether there are ties; and on a device, whose numbers it does not wait for."""
    if not waits:
        monkeypatch.setattr(varl.sampling, "_none", lambda flags: False)
    generator = torch.Generator().manual_seed(0)
    for classes in range(2, 10):
        logits = (2 * torch.randn(200, classes, generator=generator)).round() / 2
        for top_k in range(1, classes):
            kth = logits.sort(-1).values[:, classes - top_k, None]
            left = logits.masked_fill(logits < kth, -torch.inf)
            for top_p in (0.01, 0.3, 0.5, 0.75, 0.9, 0.999):
                found = filter_logits(logits, Sampling(top_k=top_k, top_p=top_p))
                assert torch.equal(found, filter_logits(left, Sampling(top_p=top_p))), (classes, top_k, top_p)


def test_many_ties_beyond_top_k() -> None:
    """Of a thousand alike classes top-p takes the last ones, however few top-k was asked for."""
    logits = torch.zeros(1, 1000)
    kept = filter_logits(logits, Sampling(top_k=3, top_p=0.2505)).isfinite().nonzero()[:, 1]
    assert kept.tolist() == list(range(749, 1000))


def test_the_same_draws_where_the_host_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = filter_logits(torch.randn(500, 3, 7, generator=torch.Generator().manual_seed(0)), Sampling(top_k=3))
    known = draw(logits, torch.Generator().manual_seed(1))
    monkeypatch.setattr(varl.sampling, "_none", lambda flags: False)
    assert torch.equal(draw(logits, torch.Generator().manual_seed(1)), known)
