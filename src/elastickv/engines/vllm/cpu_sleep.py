"""Sleep of a vLLM on the CPU, where its own does nothing: see engines/sleeper.py.

Weights are of two kinds. Tensors are written when the engine goes to sleep. What oneDNN has packed for its kernels
cannot be read back, so what it was made from is written when it is made, and is packed again on waking.

Runs in the worker, on its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import torch
from vllm.logger import init_logger

from elastickv.config import Settings
from elastickv.engines.sleeper import Sleeper as WeightSleeper
from elastickv.engines.sleeper import file_deadline
from elastickv.engines.vllm.packed import Packed
from elastickv.engines.weightfile import WeightFile, choose_directory
from elastickv.errors import ElasticKVError, EngineRefused, InvalidArgument

__all__ = ["CPU_WORKER", "OPERATIONS", "PLATFORM", "Sleeper", "begin", "check_level", "packed_besides", "wanted"]

_logger = init_logger("vllm.elastickv")

Method = Callable[..., Any]

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


class Sleeper(WeightSleeper):
    """The weights of one worker's models, and what is packed of them."""

    def __init__(self, runner: Any, directory: Path) -> None:
        super().__init__(lambda: _models(runner), directory, _logger)
        self._packed: list[Packed] = []
        self._packed_file = WeightFile(directory)

    @property
    def resident_bytes(self) -> int:
        """Of weights in memory: tensors and what is packed."""
        return super().resident_bytes + sum(one.resident for one in self._packed)

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
            packed.keep(self._packed_file, weight, file_deadline(packed.size))
        except ElasticKVError as error:
            raise EngineRefused(f"elastickv cannot let this engine sleep: {error.message}") from None
        self._packed.append(packed)

    def _release_more(self) -> None:
        for packed in self._packed:
            packed.release()

    def _restore(self, file: WeightFile) -> None:
        until = file_deadline(file.size + self._packed_file.size)
        super()._restore(file)
        for packed in self._packed:  # after the tensors: some are packed together with scales that lie in those
            packed.restore(self._packed_file, until)

    def close(self) -> None:
        """Gives the room on the disk back. What sleeps then does not wake."""
        self._packed_file.close()
        super().close()


def _models(runner: Any) -> list[torch.nn.Module]:
    drafter = getattr(getattr(runner, "drafter", None), "model", None)
    return [runner.get_model(), *([drafter] if isinstance(drafter, torch.nn.Module) else [])]


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
