import torch

from varl.models.blocks import Grids
from varl.models.layers import RMSNorm, SelfAttention, plain_norm, rotate


def test_norms_stay_in_fp32() -> None:
    """A sequence far from zero: its variance would be lost in bf16."""
    x = (1000 + torch.arange(8.0) * 8).to(torch.bfloat16)[None, None]
    assert plain_norm(x, 1e-6).dtype == torch.float32
    torch.testing.assert_close(plain_norm(x, 1e-6), plain_norm(x.float(), 1e-6))


def test_root_mean_square_in_fp32() -> None:
    norm = RMSNorm(64, 1e-6).to(torch.bfloat16)
    norm.weight.data = 1 + torch.randn(64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.to(torch.bfloat16) * norm.weight)


def test_a_rotation_turns_neighbouring_channels() -> None:
    angle = torch.tensor([[0.3, 0.5], [0.7, 0.9]])
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 4.0, 0.0, 0.0]])
    turned = torch.view_as_complex(x.view(2, 2, 2)) * torch.polar(torch.ones(2, 2), angle)
    found = rotate(x[None, None], torch.stack([angle.cos(), angle.sin()]))
    torch.testing.assert_close(found[0, 0], torch.view_as_real(turned).flatten(1))


def test_attention_by_cosine_ignores_how_long_queries_and_keys_are() -> None:
    """Unlike the other kind, whose scores ``tau`` divides; either way nothing in a grid reads a finer one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cosine, plain = SelfAttention(8, 2, True, 1.0), SelfAttention(8, 2, False, 4.0)
        x = torch.randn(3, 5, 8)
    for attention, same in [(cosine, True), (plain, False)]:
        found = attention(x, Grids([1, 4], 0, None), 0)
        torch.testing.assert_close(attention(x[:, :1], Grids([1], 0, None), 0), found[:, :1])
        attention.mat_qkv.weight.data[:16] *= 3
        assert torch.allclose(attention(x, Grids([1, 4], 0, None), 0), found, atol=1e-6) == same
    warmer = SelfAttention(8, 2, False, 36.0)
    warmer.load_state_dict(plain.state_dict())
    plain.mat_qkv.weight.data[:16] /= 3
    torch.testing.assert_close(warmer(x, Grids([1, 4], 0, None), 0), plain(x, Grids([1, 4], 0, None), 0))
