"""Sleep on the CPU, where vLLM's own does nothing: weights go to a file and their memory to the kernel.

Weights are of two kinds. Tensors are written when the engine goes to sleep. What oneDNN has packed for its kernels
cannot be read back, so what it was made from is written when it is made, and is packed again on waking.

Runs in the worker, on its thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import torch
from vllm.logger import init_logger

from elastickv.config import Settings
from elastickv.engines.vllm.model_tensors import Packed, Saved, bytes_of, held_bytes, release_to_kernel, storages
from elastickv.engines.weightfile import WeightFile, choose_directory
from elastickv.errors import ElasticKVError, EngineRefused, InvalidArgument
from elastickv.units import format_size

__all__ = ["CPU_WORKER", "OPERATIONS", "PLATFORM", "Sleeper", "begin", "check_level", "packed_besides", "wanted"]

_logger = init_logger("vllm.elastickv")

Method = Callable[..., Any]

_DEADLINE_S: Final = 60.0
_SLOWEST: Final = 20 * 1000 * 1000
"""Bytes a second: a disk that is slower than this is taken for broken."""

_recorder: ContextVar[Sleeper | None] = ContextVar("elastickv_recorder", default=None)


def wanted(config: Any) -> bool:
    """Whether the engine with this VllmConfig was asked for sleep mode, on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu() and config.model_config.enable_sleep_mode)


def check_level(config: Any, level: int) -> None:
    """Refuses what cannot be undone: vLLM cannot load weights again into layers that it has packed for the CPU."""
    if level > 1 and wanted(config):
        raise InvalidArgument(
            f"sleep level {level} throws the weights away, and vLLM cannot load them again on a CPU; "
            "use level 1: it frees as much, and keeps them on a disk",
            level=level,
        )


def packed_besides(config: Any) -> int:
    """About how many bytes a rank takes beyond its weights: vLLM packs embedding and head, and keeps them as well.

    0 where no sleep was asked for: then such copies are not counted.
    """
    if not wanted(config):
        return 0
    model = config.model_config
    size: int = model.get_vocab_size() * model.get_hidden_size() * model.dtype.itemsize
    tp: int = config.parallel_config.tensor_parallel_size
    return -(-2 * size // tp)


def begin(worker: Any) -> Sleeper | None:
    """What lets this worker sleep, made before its model is loaded; None where it was not asked for."""
    if not wanted(worker.vllm_config):
        return None
    try:
        return Sleeper(worker.model_runner, choose_directory(Settings.load().sleep_dir))
    except ElasticKVError as error:
        raise EngineRefused(f"elastickv cannot let this engine sleep: {error.message}") from None


class Sleeper:
    """The weights of one worker's models."""

    def __init__(self, runner: Any, directory: Path) -> None:
        self._runner = runner
        self._directory = directory
        self._packed: list[Packed] = []
        self._packed_file = WeightFile(directory)
        self._saved: list[Saved] = []
        self._file: WeightFile | None = None

    @property
    def asleep(self) -> bool:
        """Whether the weights are in the file only."""
        return self._file is not None

    @property
    def resident_bytes(self) -> int:
        """Of weights in memory: tensors and what is packed."""
        return held_bytes(self._models()) + sum(one.resident for one in self._packed)

    def _models(self) -> list[torch.nn.Module]:
        drafter = getattr(getattr(self._runner, "drafter", None), "model", None)
        return [self._runner.get_model(), *([drafter] if isinstance(drafter, torch.nn.Module) else [])]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What is packed in here, by this thread, belongs to this worker's model."""
        token = _recorder.set(self)
        try:
            yield
        finally:
            _recorder.reset(token)

    def keep(self, packed: Packed, weight: torch.Tensor) -> None:
        """Writes what a new packed weight was made from. EngineRefused if the disk does not take it."""
        for gone in [one for one in self._packed if one.gone]:
            self._packed.remove(gone)
            if gone.region is not None:
                self._packed_file.forget(gone.region)
        try:
            packed.keep(self._packed_file, weight, _until(packed.size))
        except ElasticKVError as error:
            raise EngineRefused(f"elastickv cannot let this engine sleep: {error.message}") from None
        self._packed.append(packed)

    def sleep(self) -> None:
        """Writes first, then frees. Unavailable or DeadlineExceeded, with everything as it was, if it cannot write."""
        if self.asleep:
            return
        before, began = _resident(), time.monotonic()
        found = storages(self._models())
        size = sum(storage.nbytes() for storage, _ in found)
        until = _until(size)
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
        size += sum(one.resident for one in self._packed)
        self._release()
        self._tell("are in", size, before, began)

    def _release(self) -> None:
        for saved in self._saved:
            saved.release()
        for packed in self._packed:
            packed.release()
        release_to_kernel()

    def wake(self) -> None:
        """Takes memory and reads all of it back. If that fails it is asleep as before, and the error says why."""
        file = self._file
        if file is None:
            return
        before, began = _resident(), time.monotonic()
        until = _until(file.size + self._packed_file.size)
        try:
            for saved in self._saved:
                saved.restore(file, until)
            for packed in self._packed:  # after the tensors: some are packed together with scales that lie in those
                packed.restore(self._packed_file, until)
        except BaseException as error:  # whatever it was goes on; half a model must not stay
            self._release()
            if isinstance(error, ElasticKVError):
                text = f"elastickv: the engine stays asleep: {error.message}"
                raise type(error)(text, **error.attributes) from None
            raise
        self._file, self._saved = None, []
        file.close()
        self._tell("came back from", self.resident_bytes, before, began)

    def _tell(self, what: str, size: int, before: int, began: float) -> None:
        _logger.info(
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
        self._packed_file.close()
        if self._file is not None:
            self._file.close()


def _until(size: int) -> float:
    return time.monotonic() + _DEADLINE_S + size / _SLOWEST


def _resident() -> int:
    """What the kernel says that this process has in memory, bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- hooks


def _possible(original: Method) -> Method:
    """vLLM refuses --enable-sleep-mode where its platform says that there is no such thing."""

    def wrapped(self: Any) -> bool:
        return True

    return wrapped


def _pack(original: Method) -> Method:
    def wrapped(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        handler = original(weight, *args, **kwargs)
        sleeper = _recorder.get()
        if sleeper is not None:
            sleeper.keep(Packed(handler, original, weight, args, kwargs), weight)
        return handler

    return wrapped


def _sleep(original: Method) -> Method:
    def wrapped(self: Any, level: int = 1) -> Any:
        sleeper: Sleeper | None = self.elastickv_sleeper
        return original(self, level) if sleeper is None else sleeper.sleep()

    return wrapped


def _wake_up(original: Method) -> Method:
    def wrapped(self: Any, tags: list[str] | None = None) -> Any:
        sleeper: Sleeper | None = self.elastickv_sleeper
        if sleeper is None:
            return original(self, tags)
        return sleeper.wake() if not tags or "weights" in tags else None

    return wrapped


def _discard(original: Method) -> Method:
    """The cache alone has nothing that the worker must throw away: its pages go by an order of the engine."""

    def wrapped(self: Any, tags: tuple[str, ...]) -> Any:
        if self.elastickv_sleeper is None or set(tags) != {"kv_cache"}:
            return original(self, tags)
        return None

    return wrapped


PLATFORM: Final = {"is_sleep_mode_available": _possible}
CPU_WORKER: Final = {"sleep": _sleep, "wake_up": _wake_up, "discard": _discard}
OPERATIONS: Final = {"create_onednn_mm": _pack, "create_onednn_scaled_mm": _pack}
"""Of vllm._custom_ops."""
