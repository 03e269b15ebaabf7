"""Every family and size against upstream's tables and vectors: what docs/models.md shows.

    python -m benchmarks.models

The small vectors come with the tests. The tables of the published checkpoints' keys and shapes are not part of the
repository; where ``VARL_PARITY`` names their folder, sizes are loaded from them strictly, on the meta device.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from models.infinity.cases import get_case  # noqa: E402
from models.switti.test_vectors import Case as SwittiCase  # noqa: E402
from models.tokenflow.cases import LM, lm_policy, prompts_of  # noqa: E402
from models.var.test_vectors import Case as VarCase  # noqa: E402
from varl import Sampling, load_policy, log_probs, rollout  # noqa: E402
from varl.adapters import adapter_state, add_adapters, merged  # noqa: E402
from varl.config import AdapterConfig  # noqa: E402
from varl.models import save_policy  # noqa: E402
from varl.policy import Condition, Policy  # noqa: E402
from varl.rollout import row_generators  # noqa: E402
from vectors import GOLDEN, PARITY  # noqa: E402

SIZES = {
    "var": {size: f"shapes/var_{size}.json" for size in ("d16", "d20", "d24", "d30", "d36-s")},
    "infinity": {
        "layer12": "shapes/infinity_125M_layer12.json",
        "layer16": "shapes/infinity_layer16.json",
        "layer24": "shapes/infinity_1B_layer24.json",
        "2b": "shapes/infinity_2b.json",
        "8b": "shapes/infinity_8b.json",
    },
    "switti": {
        size: f"real_checkpoint_keys/switti_2.5b_{size.removesuffix('-ar')}.json"
        for size in ("512", "512-ar", "1024", "1024-ar")
    },
    "tokenflow": {"7b": "real_checkpoint_keys/tokenflow_t2i_7b.json"},
}


def sizes() -> Table:
    """Parameters of every published size, and whether upstream's keys and shapes are exactly ours."""
    table = Table(title="published sizes")
    for column in ("family", "size", "parameters", "tokens", "keys", "keys and shapes"):
        table.add_column(column, justify="left" if column in ("family", "size") else "right")
    for family, files in SIZES.items():
        for size, file in files.items():
            with torch.device("meta"):
                policy = load_policy(family, {"size": size}, "random")
            ours = {key: list(value.shape) for key, value in policy.trainable.state_dict().items()}
            parameters = sum(p.numel() for p in policy.trainable.parameters())
            fits = "equal" if (PARITY / file).is_file() and _shapes(PARITY / file) == ours else "no table here"
            if (PARITY / file).is_file() and fits != "equal":
                fits = "DIFFER"
            tokens = str(policy.default_schedule.tokens)
            table.add_row(family, size, f"{parameters / 1e6:,.1f} M", tokens, str(len(ours)), fits)
    return table


def _shapes(path: Path) -> dict[str, list[int]]:
    content = json.loads(path.read_text())
    return content["keys"] if "keys" in content else {k: v["shape"] for k, v in content["state_dict"].items()}


class Vectors:
    """One family's golden case in one shape: policy, condition, forced actions, their logits and greedy tokens."""

    def __init__(self, policy: Policy, condition: Condition, actions: Tensor, logits: Tensor, greedy: bool) -> None:
        self.policy, self.condition, self.actions, self.logits, self.greedy = policy, condition, actions, logits, greedy


def _var() -> Vectors:
    case = VarCase(GOLDEN / "var" / "var_small")
    greedy = rollout(case.policy, case.condition, Sampling(guidance=4.0, top_k=1)).actions
    equal = torch.equal(greedy, case.joined("greedy_cfg4_idx"))
    return Vectors(case.policy, case.condition, case.actions, case.tensors["logits_cond"], equal)


def _infinity() -> Vectors:
    case = get_case("golden")
    greedy = rollout(case.policy, case.condition, Sampling(guidance=2.0, top_k=1)).actions
    expected = case.expected["logits_cond"].unflatten(2, (-1, 2))
    equal = torch.equal(greedy, case.bits("greedy_cfg3_tau1_bits"))
    return Vectors(case.policy, case.condition, case.actions, expected, equal)


def _switti() -> Vectors:
    case = SwittiCase(sorted((GOLDEN / "switti").iterdir())[0])
    name, settings = case.runs("greedy")[0]
    policy = case.load(turn_off_cfg_start_si=settings["turn_off_cfg_start_si"])
    greedy = rollout(policy, case.condition, Sampling(guidance=settings["cfg"], top_k=1)).actions
    expected = case.tensors["tf512.logits" if "tf512.logits" in case.tensors else "tf.logits"]
    return Vectors(case.policy, case.condition, case.actions, expected, torch.equal(greedy, case.joined(f"{name}.idx")))


def _tokenflow() -> Vectors:
    policy, tensors = lm_policy(LM), LM.tensors
    condition = policy.condition_from(prompts_of(LM))
    first, start = condition.features["prompt"].shape[1] - 1, policy.config.transformer.image_token_start
    actions = tensors["in.codes"].long()
    expected = tensors["tf.logits"][:, first : first + actions.shape[1], start : start + policy.classes]
    greedy = rollout(policy, condition, Sampling(guidance=LM.manifest["config"]["cfg"], top_k=1)).actions
    return Vectors(policy, condition, actions, expected, torch.equal(greedy, tensors["greedy.codes"].long()))


FAMILIES: dict[str, Callable[[], Vectors]] = {
    "var": _var,
    "infinity": _infinity,
    "switti": _switti,
    "tokenflow": _tokenflow,
}


def vectors() -> Table:
    """Every family's golden case: logits, greedy tokens, sampling, adapters and the way to disk and back."""
    table = Table(title="upstream's vectors (the small case that comes with the tests)")
    names = ("family", "logits", "greedy tokens", "sampled - replayed", "LoRA - merged", "export")
    for column in names:
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, make in FAMILIES.items():
        v = make()
        with torch.no_grad():
            steps = range(len(v.condition.schedule))
            logits = v.policy.logits(v.policy.hidden(v.condition, v.actions, steps))
            drawn = rollout(v.policy, v.condition, None, row_generators((0,), v.condition.batch), logp=True)
            replayed = log_probs(v.policy, v.condition, drawn.actions).logp
        assert drawn.logp is not None
        row = [_largest(logits, v.logits), "equal" if v.greedy else "DIFFER", _largest(drawn.logp, replayed)]
        exported = _exported(v.policy)
        table.add_row(family, *row, _adapted(v), exported)
    return table


def _largest(a: Tensor, b: Tensor) -> str:
    return f"{float((a - b).abs().max()):.1e}"


def _exported(policy: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        once, again = Path(folder) / "once.safetensors", Path(folder) / "again.safetensors"
        save_policy(policy, once)
        before = {key: value.clone() for key, value in policy.trainable.state_dict().items()}
        from safetensors.torch import load_file

        policy.trainable.load_state_dict(load_file(once))
        save_policy(policy, again)
        after = policy.trainable.state_dict()
        same = all(torch.equal(before[key], after[key]) for key in before) and once.read_bytes() == again.read_bytes()
    return "bitwise" if same else "DIFFERS"


def _adapted(v: Vectors) -> str:
    """The largest difference between log-probabilities with adapters and with the adapters merged."""
    add_adapters(v.policy, AdapterConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapter_state(v.policy).values():
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))
        adapted = log_probs(v.policy, v.condition, v.actions).logp
        with merged(v.policy):
            return _largest(adapted, log_probs(v.policy, v.condition, v.actions).logp)


def main() -> None:
    """Print both tables."""
    console = Console(width=120)
    console.print(sizes())
    console.print(vectors())


if __name__ == "__main__":
    main()
