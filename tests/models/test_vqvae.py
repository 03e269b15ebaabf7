"""The convolutional tokenizer against a plain second implementation that reads weights by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.vqvae import VQVAE, VQVAEConfig

CONFIG = VQVAEConfig(vocab_size=17, z_channels=4, ch=32, v_patch_nums=(1, 2, 3))


@pytest.fixture(scope="module")
def model() -> VQVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQVAE(CONFIG).requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Plain:
    """Functions of weights by name."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride, 0 if stride == 2 else weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        scaled = (groups - groups.mean(2, True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        scaled = scaled.view(x.shape)
        return scaled * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def block(self, name: str, x: Tensor) -> Tensor:
        h = x
        for i in (1, 2):
            h = self.norm(f"{name}.norm{i}", h)
            h = self.conv(f"{name}.conv{i}", h * torch.sigmoid(h))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in self.weights else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self.conv(f"{name}.qkv", self.norm(f"{name}.norm", x)).flatten(2).chunk(3, 1)
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.block(f"{name}.block_2", self.attend(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def out(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(f"{name}.norm_out", x)
        return self.conv(f"{name}.conv_out", x * torch.sigmoid(x))

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(5):
            for i in range(2):
                x = self.block(f"encoder.down.{level}.block.{i}", x)
                if level == 4:
                    x = self.attend(f"encoder.down.4.attn.{i}", x)
            if level < 4:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 2)
        return self.conv("quant_conv", self.out("encoder", self.middle("encoder.mid", x)))

    def decode(self, x: Tensor) -> Tensor:
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", x)))
        for level in (4, 3, 2, 1, 0):
            for i in range(3):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
                if level == 4:
                    x = self.attend(f"decoder.up.4.attn.{i}", x)
            if level > 0:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x)
        return self.out("decoder", x)


def test_encoder_and_decoder(model: VQVAE) -> None:
    plain = Plain(model.state_dict())
    pictures = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    features = model.features(pictures)
    assert features.shape == (2, 4, 3, 3)
    torch.testing.assert_close(features, plain.encode(2 * pictures - 1), atol=1e-4, rtol=1e-4)
    actions = model.encode(pictures)
    assert torch.equal(actions, model.quantize.encode(features))
    total = 8 * features
    expected = plain.decode(total)
    assert expected.abs().max() > 1, "some pixels must be clamped"
    torch.testing.assert_close(model.picture(total), (expected.clamp(-1, 1) + 1) / 2, atol=1e-4, rtol=1e-4)


def test_every_weight_has_an_effect_or_a_reason(model: VQVAE) -> None:
    """Gradients reach all parameters but the codebook and what smooths it, which the round trip does not use."""
    copy = VQVAE(CONFIG)
    copy.load_state_dict(model.state_dict())
    copy.picture(copy.features(torch.rand(1, 3, 48, 48))).sum().backward()
    without = {name for name, p in copy.named_parameters() if p.grad is None}
    assert without == {name for name in dict(copy.named_parameters()) if name.startswith("quantize.")}


def test_codes_by_cosine() -> None:
    by_cosine = VQVAE(VQVAEConfig(vocab_size=2, z_channels=2, ch=32, v_patch_nums=(1, 2), using_znorm=True)).quantize
    by_distance = VQVAE(VQVAEConfig(vocab_size=2, z_channels=2, ch=32, v_patch_nums=(1, 2))).quantize
    z = torch.tensor([1.0, 0.2]).view(1, 2, 1, 1)
    for quantizer in (by_cosine, by_distance):
        quantizer.embedding.weight.data = torch.tensor([[9.0, 2.0], [0.8, -0.2]])
    assert by_cosine.nearest(z).item() == 0
    assert by_distance.nearest(z).item() == 1


def test_steps_share_convolutions() -> None:
    quantizer = VQVAE(VQVAEConfig(vocab_size=3, z_channels=2, ch=32, v_patch_nums=(1, 2, 3, 4, 5))).quantize
    h = torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        for step, shared in enumerate([0, 1, 2, 2, 3]):
            key = f"quant_resi.qresi_ls.{shared}"
            weight, bias = (quantizer.state_dict()[f"{key}.{kind}"] for kind in ("weight", "bias"))
            expected = 0.5 * h + 0.5 * F.conv2d(h, weight, bias, padding=1)
            torch.testing.assert_close(quantizer.smooth(h, step), expected)
