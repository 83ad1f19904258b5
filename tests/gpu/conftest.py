"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def vllm_on_gpu() -> None:
    """Skips where no vLLM can run a model on a GPU."""
    pytest.importorskip("vllm")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, or a torch without CUDA")
