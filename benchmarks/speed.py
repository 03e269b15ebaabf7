"""VAR d16 at its real size (random weights, 256 px, fp32): this machine against upstream's code on another.

    python -m benchmarks --only sampler

Generation: guided (4, top-k 900, top-p 0.96), a batch of 4, with the decoder. Training: forward and backward of all
log-probabilities, a batch of 2. Each is measured in turn with a 4096-cubed fp32 matrix product, so that a machine that
slows down slows both, and given in units of that product's time, so that machines can be compared. Upstream's code on
two cores of a Xeon whose product ran at 255 GFLOP/s took 5.6 s a picture and 11.6 s a training pass.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.measure import SIDE, Row, Settings, Spread, product, timed
from varl import Prompt, Sampling, load_policy, log_probs, rollout

__all__ = ["TITLE", "rows"]

TITLE = "sampler: VAR d16 at real size, in units of a 4096-cubed matrix product (ours / upstream)"
UNIT = 2 * SIDE**3
"""Operations of the product that times are given in."""
UPSTREAM_PRODUCT = UNIT / 255e9
UPSTREAM = {"picture (batch of 4)": 5.6, "training pass (batch of 2)": 11.6}


def rows(settings: Settings, folder: Path) -> list[Row]:
    """A picture and a training pass."""
    torch.manual_seed(settings.seed)
    policy = load_policy("var", {"size": "d16"}, "random").to(settings.device)  # type: ignore[attr-defined]
    four, two = (policy.condition([Prompt(label=i) for i in range(n)]) for n in (4, 2))
    actions = torch.randint(policy.classes, (2, four.schedule.tokens), device=settings.device)
    sampling = Sampling(guidance=4.0, top_k=900, top_p=0.96)
    multiply, operations = product(settings)

    def picture() -> None:
        policy.decode(rollout(policy, four, sampling).actions)

    def training() -> None:
        log_probs(policy, two, actions).logp.sum().backward()
        policy.trainable.zero_grad()

    work = {"picture (batch of 4)": (picture, 4), "training pass (batch of 2)": (training, 1)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    timed(multiply, settings.device)
    for _ in range(settings.rounds):
        for name, (call, share) in work.items():
            one = timed(multiply, settings.device) * UNIT / operations
            found[name].append((timed(call, settings.device) / share, one))
    return [_row(name, pairs) for name, pairs in found.items()]


def _row(name: str, pairs: list[tuple[float, float]]) -> Row:
    own = Spread.of([seconds / one for seconds, one in pairs])
    upstream = UPSTREAM[name] / UPSTREAM_PRODUCT
    seconds, one = (Spread.of(values).median for values in zip(*pairs, strict=True))
    text = f"ours / upstream; {seconds:.2f} s, product {UNIT / one / 1e9:,.0f} GFLOP/s"
    return Row("VAR d16, 256 px, fp32", name, "products", own, Spread.exact(upstream), own.over(upstream), text)
