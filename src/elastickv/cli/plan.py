"""`elastickv plan MODEL...`: what models need on a device, and whether they fit together. Nothing is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.console import Console

from elastickv.cli import options as opt
from elastickv.cli.plan_text import as_dict, render
from elastickv.config import Settings
from elastickv.engines import adapter
from elastickv.errors import InvalidArgument
from elastickv.ledger import open_ledger
from elastickv.ledgers import device_names
from elastickv.memory import device_page, gpu
from elastickv.planning import (
    Model,
    Serving,
    allowance,
    cache_shape,
    plan_device,
    read_architecture,
    read_checkpoint,
)
from elastickv.units import parse_size

__all__ = ["Place", "plan"]

T = TypeVar("T")

_KV: Final = {"auto": None, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "bfloat16": 2, "float16": 2}
_TYPES: Final = {"auto": None, "float32": 4, "bfloat16": 2, "float16": 2}
_GPU_STEP: Final = 8192
_HOST_STEP: Final = 4096
"""vLLM's default tokens of a step: of `vllm serve` on a GPU of 70 GiB or more, and of its Python class on a CPU."""
_HOLDING: Final = (0, 33)
"""From this version on vLLM lets go of blocks behind a window at once; before it elastickv holds them on a GPU."""

_EACH: Final = "One value for all models, or the option once for each, in their order."


_DEVICE: Final = typer.Option(
    metavar="DEVICE|SIZE",
    help="A device with a ledger, a GPU's number or UUID, a GPU of a size (80GiB), or host:SIZE.",
    show_default=False,
)


@dataclass(frozen=True)
class Place:
    """The device that is planned for. Sizes in bytes."""

    name: str
    capacity: int
    page_bytes: int

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU, or a size that stands for one."""
        return self.name != "host"


def plan(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders of models, or their config.json.")],
    device: Annotated[str | None, _DEVICE] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, max=1024, help="Ranks of tensor parallelism, a GPU each.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, max=1024, help="Pipeline stages, a GPU each.")] = 1,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help=f"Type of the weights: {', '.join(_TYPES)}.")] = "auto",
    kv_dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help=f"Type of the cache: {', '.join(_KV)}. {_EACH} [default: auto]"),
    ] = None,
    max_model_len: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help=f"Tokens of the longest request. {_EACH} [default: the model's own]"),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help=f"Bytes guaranteed to a model, weights included. {_EACH} [default: 0]"),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens a block. [default: as the engine]")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of a step. [default: 8192 on a GPU, 4096 on the host]"),
    ] = None,
    directory: opt.Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Say what models need on a device, and whether they fit together.

    Reads each model's config.json and the sizes in its checkpoint; starts and loads nothing. Leaves with 1 if they do
    not fit together.
    """
    settings = Settings.load(options={"directory": directory})
    place = _place(device, settings)
    floors = _each(floor or ["0"], models, "--floor")
    kinds = _each(kv_dtype or ["auto"], models, "--kv-dtype")
    lengths: list[int | None] = list(_each(max_model_len, models, "--max-model-len")) if max_model_len else []
    serving = _Wish(place, tp, pp, _choice(dtype, _TYPES, "--dtype"), block_size, max_num_batched_tokens)
    made = [
        serving.model(
            Path(path),
            kv=_choice(kinds[i], _KV, "--kv-dtype"),
            length=lengths[i] if lengths else None,
            floor=parse_size(floors[i], "--floor"),
        )
        for i, path in enumerate(models)
    ]
    planned = plan_device(place.capacity, _named_apart(made))
    if as_json:
        print(json.dumps(as_dict(planned, place.name, place.page_bytes), indent=2))
    else:
        Console(highlight=False).print(render(planned, place.name, ranks=tp * pp))
    if not planned.fits:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Wish:
    place: Place
    tp: int
    pp: int
    width: int | None
    block_size: int | None
    step: int | None

    @property
    def in_flight(self) -> int:
        """Tokens of all steps that may be under way at once, as vLLM counts them."""
        step = self.step or (_GPU_STEP if self.place.on_gpu else _HOST_STEP)
        return step * (self.pp + 1 if self.place.on_gpu else self.pp)

    def model(self, path: Path, *, kv: int | None, length: int | None, floor: int) -> Model:
        read = read_architecture(path)
        folder = path if path.is_dir() else path.parent
        width = self.width or min(2, read.dtype_bytes)
        loaded = max(read_checkpoint(folder).rank_bytes(read, tp=self.tp, pp=self.pp, width=width))
        weights = loaded + read.rotary * width
        longest = length or read.max_length
        if longest is None:
            raise InvalidArgument(f"plan: {read.name} does not say how long a request may be; give --max-model-len")
        serving = Serving(
            on_gpu=self.place.on_gpu,
            tp=self.tp,
            pp=self.pp,
            width=width,
            kv_width=kv or width,
            block_tokens=self.block_size,
            block_outermost=self.place.on_gpu,
            in_flight=self.in_flight,
            hold_windows=self.place.on_gpu and _holds_windows(),
        )
        smaller = dataclasses.replace(serving, kv_width=1)
        return Model(
            name=read.name,
            weights=weights,
            allowance=allowance(weights, on_gpu=self.place.on_gpu),
            shape=cache_shape(read, serving),
            page_bytes=self.place.page_bytes,
            length=longest,
            floor=floor,
            fp8=cache_shape(read, smaller) if serving.kv_width > 1 and self.place.on_gpu else None,
        )


def _holds_windows() -> bool:
    """Whether the vLLM that is installed here needs blocks behind a window to be held; none installed: the newest."""
    version = adapter("vllm").installed_version()
    if version is None:
        return False
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < _HOLDING


def _place(device: str | None, settings: Settings) -> Place:
    names = device_names(settings.directory)
    if device is None:
        if len(names) != 1:
            there = f"there are ledgers of {', '.join(names)}" if names else "there is no ledger here"
            raise InvalidArgument(f"plan: which device? {there}; name one, or a size: --device 80GiB")
        return _of_ledger(names[0], settings)
    if device in names:
        return _of_ledger(device, settings)
    number = device.removeprefix("cuda:")
    if number.isdecimal() and len(number) <= 3:
        return _of_gpu(_numbered(int(number)), names, settings)
    if device.startswith(("GPU-", "MIG-")):
        return _of_gpu(device, names, settings)
    kind, _, size = device.rpartition(":")
    if device == "host" or kind not in ("", "host"):
        raise InvalidArgument(f"--device: {device!r} has no ledger in {settings.directory}; name a size: host:8GiB")
    capacity = parse_size(size, "--device")
    if not capacity:
        raise InvalidArgument("--device: a device of 0 bytes holds nothing; write a size such as 80GiB")
    return Place(kind or "GPU", capacity, device_page(kind or "GPU", settings, capacity))


def _numbered(index: int) -> str:
    visible = gpu.visible_devices()
    if index >= len(visible):
        raise InvalidArgument(f"--device: there is no GPU {index}; {len(visible)} are visible here")
    return visible[index]


def _of_gpu(uuid: str, names: list[str], settings: Settings) -> Place:
    if uuid in names:
        return _of_ledger(uuid, settings)
    total, _ = gpu.device_memory(uuid)
    return Place(uuid, total, device_page(uuid, settings, total))


def _of_ledger(name: str, settings: Settings) -> Place:
    view = open_ledger(settings, name).view()
    capacity = int(view["capacity"]) - int(view["unmanaged"])
    return Place(name, capacity, device_page(name, settings, int(view["capacity"])))


def _each(values: Sequence[T], models: Sequence[str], option: str) -> list[T]:
    if len(values) == 1:
        return [*values] * len(models)
    if len(values) != len(models):
        raise InvalidArgument(
            f"{option}: {len(values)} values for {len(models)} models; give one for all of them, or one for each"
        )
    return [*values]


def _choice(text: str, known: dict[str, int | None], option: str) -> int | None:
    if text not in known:
        raise InvalidArgument(f"{option}: {text!r} is none of {', '.join(known)}", value=text)
    return known[text]


def _named_apart(models: list[Model]) -> list[Model]:
    """A model that is named twice gets a number."""
    seen: dict[str, int] = {}
    named = []
    for model in models:
        seen[model.name] = seen.get(model.name, 0) + 1
        count = seen[model.name]
        named.append(model if count == 1 else dataclasses.replace(model, name=f"{model.name}#{count}"))
    return named
