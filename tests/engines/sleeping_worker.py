"""A worker that sleeps on the CPU, where vLLM's own does not: it lets go of the model's parameters and restores them.

What the CPU's kernels have packed away stays, as a GPU's context and graphs would.
"""

from __future__ import annotations

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class SleepingWorker(CPUWorker):  # type: ignore[misc]
    saved: dict[str, torch.Tensor] | None = None

    def sleep(self, level: int = 1) -> None:
        self.saved = {}
        for name, tensor in self.model_runner.get_model().named_parameters():
            if tensor.numel():
                self.saved[name] = tensor.detach().clone()
                tensor.untyped_storage().resize_(0)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if self.saved is None or (tags and "weights" not in tags):
            return
        for name, tensor in self.model_runner.get_model().named_parameters():
            if name in self.saved:
                tensor.untyped_storage().resize_(self.saved[name].untyped_storage().nbytes())
                tensor.detach().copy_(self.saved[name])
        self.saved = None
