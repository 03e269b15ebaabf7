import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varl import ScaleSchedule
from varl.models.quantizer import MultiScaleQuantizer, resize_area, resize_up

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 2), (6, 4)), stride=2)
CODES, WIDTH, BATCH = 19, 5, 3


@pytest.fixture(params=["bicubic", "nearest"])
def quantizer(request: pytest.FixtureRequest) -> MultiScaleQuantizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiScaleQuantizer(CODES, WIDTH, SCHEDULE, ratio=0.3, enlarge=request.param).requires_grad_(False)


@pytest.fixture
def features() -> Tensor:
    return 2 * torch.randn(BATCH, WIDTH, 6, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def actions() -> Tensor:
    return torch.randint(CODES, (BATCH, SCHEDULE.tokens), generator=torch.Generator().manual_seed(2))


def added(quantizer: MultiScaleQuantizer, tokens: Tensor, step: int) -> Tensor:
    """What one step's tokens of one picture add, written out: [C, 6, 4]."""
    h, w = SCHEDULE.grids[step]
    grid = torch.zeros(WIDTH, h, w)
    for i in range(h):
        for j in range(w):
            grid[:, i, j] = quantizer.embedding.weight[tokens[i * w + j]]
    large = grid if (h, w) == (6, 4) else F.interpolate(grid[None], size=(6, 4), mode=quantizer.enlarge)[0]
    phi = quantizer.phi[step]
    return 0.7 * large + 0.3 * F.conv2d(large[None], phi.weight, phi.bias, padding=1)[0]


def test_encode_is_the_greedy_recursion(quantizer: MultiScaleQuantizer, features: Tensor) -> None:
    found = quantizer.encode(features)
    assert found.shape == (BATCH, SCHEDULE.tokens)
    for row in range(BATCH):
        rest = features[row].clone()
        for step, (h, w) in enumerate(SCHEDULE.grids):
            tokens = []
            for i in range(h):
                for j in range(w):
                    cell = rest[:, i * 6 // h : (i + 1) * 6 // h, j * 4 // w : (j + 1) * 4 // w].mean((1, 2))
                    distances = [float((cell - code).square().sum()) for code in quantizer.embedding.weight]
                    tokens.append(min(range(CODES), key=lambda c: distances[c]))
            assert found[row, SCHEDULE.tokens_of(step)].tolist() == tokens
            rest = rest - added(quantizer, torch.tensor(tokens), step)


def test_features_are_the_sum_of_the_steps(quantizer: MultiScaleQuantizer, actions: Tensor) -> None:
    for steps in range(1, 5):
        found = quantizer.features(actions[:, : SCHEDULE.offsets[steps]])
        for row in range(BATCH):
            parts = [added(quantizer, actions[row, SCHEDULE.tokens_of(s)], s) for s in range(steps)]
            torch.testing.assert_close(found[row], sum(parts), atol=1e-5, rtol=1e-5)


def test_input_maps(quantizer: MultiScaleQuantizer, actions: Tensor) -> None:
    total, inputs = quantizer.accumulate(actions, 4)
    assert torch.equal(total, quantizer.features(actions))
    assert [m.shape[2:] for m in inputs] == list(SCHEDULE.grids[1:])
    for step in (1, 2, 3):
        so_far = quantizer.features(actions[:, : SCHEDULE.offsets[step]])
        h, w = SCHEDULE.grids[step]
        for i in range(h):
            for j in range(w):
                expected = so_far[:, :, i * 6 // h : (i + 1) * 6 // h, j * 4 // w : (j + 1) * 4 // w].mean((2, 3))
                torch.testing.assert_close(inputs[step - 1][:, :, i, j], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("steps", "until", "maps"), [(1, 2, 1), (2, 3, 2), (3, 4, 3), (4, 2, 1), (4, 0, 0), (2, 4, 2)])
def test_as_many_input_maps_as_asked_and_known(
    quantizer: MultiScaleQuantizer, actions: Tensor, steps: int, until: int, maps: int
) -> None:
    _, inputs = quantizer.accumulate(actions[:, : SCHEDULE.offsets[steps]], until)
    _, every = quantizer.accumulate(actions, 4)
    assert len(inputs) == maps
    assert all(torch.equal(a, b) for a, b in zip(inputs, every, strict=False))


@pytest.mark.parametrize("tokens", [0, 2, 10, 36])
def test_sequences_end_with_a_step(quantizer: MultiScaleQuantizer, tokens: int) -> None:
    with pytest.raises(ValueError, match="end inside a step"):
        quantizer.features(torch.zeros(1, tokens, dtype=torch.long))


def test_each_step_takes_what_the_ones_before_left() -> None:
    """With a codebook that holds the residuals, encoding is exact."""
    schedule = ScaleSchedule.square([1, 2], stride=1)
    own = MultiScaleQuantizer(5, 1, schedule, ratio=0.0, enlarge="nearest").requires_grad_(False)
    own.embedding.weight[:] = torch.tensor([[4.0], [-2.0], [-1.0], [1.0], [2.0]])
    picture = torch.tensor([[[[2.0, 3.0], [5.0, 6.0]]]])
    found = own.encode(picture)
    assert found.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(own.features(found), picture)


def test_resizing() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize_area(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize_area(x, (4, 4)) is x
    assert resize_up(x, (4, 4)) is x
    assert resize_up(x[:, :, :2, :2], (4, 4), "nearest")[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert resize_up(x, (8, 8)).shape == (1, 1, 8, 8)
