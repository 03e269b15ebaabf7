import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.blocks import KeyValueCache, PrefixKeys, attend_by_scale, run_block

COUNTS = [1, 4, 6]
STEP = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
LAYERS, ROWS, HEADS, TOKENS, WIDTH = 2, 3, 2, 11, 4


def qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, ROWS, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_token_sees_its_grid_and_coarser_ones(scale: float | None) -> None:
    q, k, v = qkv()
    visible = STEP[None, :] <= STEP[:, None]
    scores = q @ k.transpose(2, 3) * (WIDTH**-0.5 if scale is None else scale)
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend_by_scale(q, k, v, COUNTS, scale), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_are_those_of_masked_attention(first: int) -> None:
    """Keys and values collect the gradients of all grids that see them; a prefix has no queries."""
    q, k, v = (x.double().requires_grad_() for x in qkv())
    start, weight = sum(COUNTS[:first]), torch.randn(ROWS, HEADS, TOKENS, WIDTH, dtype=torch.double)
    scores = q @ k.transpose(2, 3) * WIDTH**-0.5
    masked = scores.masked_fill(STEP[None, :] > STEP[:, None], -torch.inf).softmax(-1) @ v
    ours = attend_by_scale(q[:, :, start:], k, v, COUNTS[first:])
    found, expected = (
        torch.autograd.grad((out * weight[:, :, start:]).sum(), (q, k, v)) for out in (ours, masked[:, :, start:])
    )
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("first", [1, 2])
def test_queries_after_a_prefix(first: int) -> None:
    q, k, v = qkv()
    start = sum(COUNTS[:first])
    found = attend_by_scale(q[:, :, start:], k, v, COUNTS[first:])
    torch.testing.assert_close(found, attend_by_scale(q, k, v, COUNTS)[:, :, start:], atol=1e-6, rtol=0)


def cache() -> KeyValueCache:
    return KeyValueCache(LAYERS, TOKENS)


def test_what_is_written_is_returned() -> None:
    _, k, v = qkv()
    own = cache()
    with torch.no_grad():
        for layer in range(LAYERS):
            own.write(layer, 0, k[:, :, :5] + layer, v[:, :, :5] - layer)
            keys, values = own.write(layer, 5, k[:, :, 5:] + layer, v[:, :, 5:] - layer)
            assert torch.equal(keys, k + layer)
            assert torch.equal(values, v - layer)
    assert torch.equal(own.keys[0], k)
    assert torch.equal(own.values[1], v - 1)


def test_a_cache_takes_the_type_of_its_first_keys() -> None:
    _, k, v = qkv()
    own = cache()
    own.write(0, 0, k.bfloat16(), v.bfloat16())
    assert own.keys.dtype == own.values.dtype == torch.bfloat16
    own = cache()
    with torch.autocast("cpu", torch.bfloat16):
        own.write(0, 0, k, v)
    assert own.keys.dtype == own.values.dtype == torch.bfloat16


def test_a_prefix_read_by_several_rows_gets_the_gradients_of_all() -> None:
    _, k, v = qkv()
    known, new = k[:2, :, :5].clone().requires_grad_(), k[:, :, 5:].clone()
    prefix = PrefixKeys()
    kept, _ = prefix.write(0, 0, known, v[:2, :, :5])
    assert kept is known
    rows = torch.cat([new, new[:1]])
    keys, values = prefix.shared(2, 2).write(0, 5, rows, torch.cat([v, v[:1]])[:, :, 5:])
    assert torch.equal(keys, torch.cat([known.detach()[[0, 0, 1, 1]], rows], 2))
    assert torch.equal(values[:, :, :5], v[[0, 0, 1, 1], :, :5])
    weight = torch.randn(keys.shape, generator=torch.Generator().manual_seed(2))
    (keys * weight).sum().backward()
    assert known.grad is not None
    torch.testing.assert_close(known.grad, weight[:, :, :5].unflatten(0, (2, 2)).sum(1))


def test_the_prefix_of_a_cache_is_its_first_rows() -> None:
    _, k, v = qkv()
    own = cache()
    for layer in range(LAYERS):
        own.write(layer, 0, k[:, :, :5] + layer, v[:, :, :5])
    prefix = own.shared(2, 1)
    assert [tuple(kept.shape) for kept in prefix.keys] == [(2, HEADS, 5, WIDTH)] * LAYERS
    keys, values = prefix.write(1, 5, k[:2, :, 5:] + 1, v[:2, :, 5:])
    assert torch.equal(keys, k[:2] + 1)
    assert torch.equal(values, v[:2])


def test_selected_rows_are_copies() -> None:
    _, k, v = qkv()
    own = cache()
    with torch.no_grad():
        own.write(1, 0, k[:, :, :5], v[:, :, :5])
        chosen = own.select(torch.tensor([2, 0, 2, 1]))
        assert chosen.filled == 5
        assert chosen.keys.shape == (LAYERS, 4, HEADS, TOKENS, WIDTH)
        assert torch.equal(chosen.keys[1, :, :, :5], k[[2, 0, 2, 1], :, :5])
        assert torch.equal(chosen.values[1, :, :, :5], v[[2, 0, 2, 1], :, :5])
        chosen.write(1, 0, k[[0, 0, 0, 0], :, :5], v[[0, 0, 0, 0], :, :5])
    assert torch.equal(own.keys[1, :, :, :5], k[:, :, :5])


def test_attention_of_one_grid_is_plain() -> None:
    q, k, v = qkv()
    assert torch.equal(attend_by_scale(q, k, v, [TOKENS]), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("first", [0, 2])
def test_keys_that_nobody_may_see(first: int) -> None:
    q, k, v = qkv()
    start = sum(COUNTS[:first])
    seen = torch.rand(ROWS, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[..., 0] = True
    found = attend_by_scale(q[:, :, start:], k, v, COUNTS[first:], mask_B11K=seen)
    visible = (STEP[None, :] <= STEP[:, None]) & seen
    scores = (q @ k.transpose(2, 3) * WIDTH**-0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ v)[:, :, start:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_is_run_again_only_where_gradients_are_recorded(checkpointing: bool) -> None:
    runs: list[int] = []
    block = torch.nn.Linear(3, 3)
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    x = torch.ones(2, 3, requires_grad=True)
    run_block(checkpointing, block, x).square().sum().backward()
    assert len(runs) == 1 + checkpointing
    assert block.weight.grad is not None
    with torch.no_grad():
        run_block(checkpointing, block, x)
    assert len(runs) == 2 + checkpointing
