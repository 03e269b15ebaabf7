import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varl import ScaleSchedule
from varl.models.inkling.transformer import Transformer

SCHEDULE = ScaleSchedule.square((1, 2, 3, 6), 8)
CELLS, CODE = 7, 5


@pytest.fixture(scope="module")
def model() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(SCHEDULE, 11, CODE, CELLS, 16, 3, 2).eval()


def made(seed: int = 0, rows: int = 2) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(rows, CODE, h, w, generator=g) for h, w in SCHEDULE.grids[1:]]
    return torch.randint(CELLS, (rows, 6, 6), generator=g), maps


def plain(model: Transformer, cells: Tensor, maps: list[Tensor]) -> Tensor:
    """The whole sequence under one explicit mask."""
    step = torch.tensor(SCHEDULE.step_of_token())
    bias = torch.zeros(50, 50).masked_fill(step[None] > step[:, None], -torch.inf)
    embedded = model.cell(cells)
    tokens = []
    for s, (h, w) in enumerate(SCHEDULE.grids):
        for i in range(h):
            for j in range(w):
                block = embedded[:, i * 6 // h : (i + 1) * 6 // h, j * 6 // w : (j + 1) * 6 // w]
                token = block.mean((1, 2)) + model.position[len(tokens)]
                token = token + (model.first if s == 0 else model.enter(maps[s - 1][:, :, i, j]))
                tokens.append(token)
    x = torch.stack(tokens, 1)
    for block in model.blocks:
        q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in (q, k, v))
        attended = (q @ k.transpose(2, 3) / 8**0.5 + bias).softmax(-1) @ v
        x = x + block.out(attended.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm2(x)), approximate="tanh"))
    return model.norm(x)


def test_against_one_masked_pass(model: Transformer) -> None:
    cells, maps = made()
    found = model(cells, maps, range(4))
    assert found.shape == (2, 50, 16)
    torch.testing.assert_close(found, plain(model, cells, maps), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_first_steps_alone(model: Transformer, last: int) -> None:
    cells, maps = made()
    whole = model(cells, maps, range(4))
    found = model(cells, maps[: last - 1], range(last))
    torch.testing.assert_close(found, whole[:, : SCHEDULE.offsets[last]], atol=1e-5, rtol=0)


def test_step_by_step_with_a_cache(model: Transformer) -> None:
    cells, maps = made()
    with torch.no_grad():
        whole, cache = model(cells, maps, range(4)), model.new_cache()
        parts = [model(cells, maps[max(s - 1, 0) : s], range(s, s + 1), cache) for s in range(4)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
        # Two steps at once from the same cache.
        both = model(cells, maps[1:], range(2, 4), cache)
        torch.testing.assert_close(both, whole[:, 5:], atol=1e-5, rtol=0)


def test_the_condition_reaches_the_tokens_of_its_place(model: Transformer) -> None:
    cells, _ = made()
    changed = cells.clone()
    changed[:, 5, 0] = (changed[:, 5, 0] + 1) % CELLS
    moved = (model.condition_map(cells, range(4)) != model.condition_map(changed, range(4))).any(2)[0]
    # The whole picture; the lower left quarter; the lower left ninth; the lower left cell.
    assert moved.nonzero().flatten().tolist() == [0, 3, 11, 44]
    assert torch.equal(model.condition_map(cells, range(2, 4)), model.condition_map(cells, range(4))[:, 5:])


def test_every_parameter_is_used(model: Transformer) -> None:
    cells, maps = made()
    loss = model.head(model(cells, maps, range(4))).square().sum()
    for gradient in torch.autograd.grad(loss, list(model.parameters())):
        assert gradient.abs().max() > 0


def test_a_new_model_is_near_uniform() -> None:
    torch.manual_seed(0)
    model = Transformer(SCHEDULE, 64, CODE, CELLS, 32, 2, 2)
    cells, maps = made()
    logp = model.head(model(cells, maps, range(4))).detach().log_softmax(-1)
    assert float(-(logp.exp() * logp).sum(-1).mean()) == pytest.approx(torch.tensor(64.0).log().item(), abs=0.02)
