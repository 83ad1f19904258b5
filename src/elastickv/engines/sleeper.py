"""Sleep on the CPU, where the engines' own frees nothing: weights go to a file and their memory to the kernel.

Runs in the process that has the weights, on its thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from elastickv.engines.model_tensors import Saved, bytes_of, held_bytes, release_to_kernel, storages
from elastickv.engines.weightfile import WeightFile
from elastickv.errors import ElasticKVError
from elastickv.units import format_size

__all__ = ["Sleeper", "file_deadline"]

_DEADLINE_S: Final = 60.0
_SLOWEST: Final = 20 * 1000 * 1000
"""Bytes a second: a disk that is slower than this is taken for broken."""


def file_deadline(size: int) -> float:
    """When `size` bytes must have been written or read; of time.monotonic()."""
    return time.monotonic() + _DEADLINE_S + size / _SLOWEST


class Sleeper:
    """The weights of one process's models. `models` is asked for them at each sleep."""

    def __init__(self, models: Callable[[], list[torch.nn.Module]], directory: Path, logger: logging.Logger) -> None:
        self._models = models
        self._directory = directory
        self._logger = logger
        self._saved: list[Saved] = []
        self._file: WeightFile | None = None

    @property
    def asleep(self) -> bool:
        """Whether the weights are in the file only."""
        return self._file is not None

    @property
    def resident_bytes(self) -> int:
        """Of weights in memory."""
        return held_bytes(self._models())

    def sleep(self) -> None:
        """Writes first, then frees. Unavailable or DeadlineExceeded, with everything as it was, if it cannot write."""
        if self.asleep:
            return
        before, began, size = _resident(), time.monotonic(), self.resident_bytes
        found = storages(self._models())
        until = file_deadline(sum(storage.nbytes() for storage, _ in found))
        file = WeightFile(self._directory)
        try:
            saved = [Saved(storage, tensors, file.reserve(storage.nbytes())) for storage, tensors in found]
            for one, (storage, _) in zip(saved, found, strict=True):
                file.write(one.region, bytes_of(storage), until)
        except ElasticKVError as error:
            file.close()
            text = f"elastickv: the engine stays awake: {error.message}"
            raise type(error)(text, **error.attributes) from None
        found.clear()
        self._file, self._saved = file, saved
        self._release()
        self._tell("are in", size, before, began)

    def _release(self) -> None:
        for saved in self._saved:
            saved.release()
        self._release_more()
        release_to_kernel()

    def _release_more(self) -> None:
        """What is no tensor; none here."""

    def wake(self) -> None:
        """Takes memory and reads all of it back. If that fails it is asleep as before, and the error says why."""
        file = self._file
        if file is None:
            return
        before, began = _resident(), time.monotonic()
        try:
            self._restore(file)
        except BaseException as error:  # whatever it was goes on; half a model must not stay
            self._release()
            if isinstance(error, ElasticKVError):
                text = f"elastickv: the engine stays asleep: {error.message}"
                raise type(error)(text, **error.attributes) from None
            raise
        self._file, self._saved = None, []
        file.close()
        self._tell("came back from", self.resident_bytes, before, began)

    def _restore(self, file: WeightFile) -> None:
        until = file_deadline(file.size)
        for saved in self._saved:
            saved.restore(file, until)

    def _tell(self, what: str, size: int, before: int, began: float) -> None:
        self._logger.info(
            "elastickv: %s of weights %s %s: %.2f s, the process had %s in memory and has %s",
            format_size(size),
            what,
            self._directory,
            time.monotonic() - began,
            format_size(before),
            format_size(_resident()),
        )

    def close(self) -> None:
        """Gives the room on the disk back. What sleeps then does not wake."""
        if self._file is not None:
            self._file.close()


def _resident() -> int:
    """What the kernel says that this process has in memory, bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
