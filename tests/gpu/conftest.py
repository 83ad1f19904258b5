"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def vllm_on_gpu() -> None:
    """Skips where no vLLM can run a model on a GPU."""
    pytest.importorskip("vllm")
    _torch_sees_a_gpu()


@pytest.fixture(scope="session")
def sglang_on_gpu() -> None:
    """Skips where no SGLang can run a model on a GPU."""
    pytest.importorskip("sglang")
    _torch_sees_a_gpu()


def _torch_sees_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here, or a torch without CUDA")
