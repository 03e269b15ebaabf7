"""A small random policy and prompts that many tests share."""

from __future__ import annotations

import pytest
import torch

from small import make_inkling, make_prompts
from varl.models.inkling import Inkling
from varl.policy import Prompt

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _shared_inkling() -> Inkling:
    return make_inkling()


@pytest.fixture
def inkling(_shared_inkling: Inkling) -> Inkling:
    """A small random policy, shared: tests must not change it."""
    return _shared_inkling


@pytest.fixture
def prompts() -> list[Prompt]:
    """Eight prompts."""
    return make_prompts(8)
