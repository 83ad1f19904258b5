"""`elastickv serve`: one address for many models."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.errors import ConfigError, ElasticKVError, InvalidArgument
from elastickv.gateway.records import default_state
from elastickv.gateway.spec import GatewaySpec, load, parse_pair
from elastickv.units import parse_seconds

if TYPE_CHECKING:
    from elastickv.gateway.fleet import EngineFleet
    from elastickv.gateway.server import Server

__all__ = ["serve"]

_EXAMPLE: Final = "elastickv serve chat=/models/chat code=/models/code, or elastickv serve models.toml"


def serve(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODELS.toml|NAME=PATH...", show_default=False)] = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help=f"Where to listen [default: {GatewaySpec.host}].")
    ] = None,
    port: Annotated[int | None, typer.Option(metavar="PORT", help=f"[default: {GatewaySpec.port}]")] = None,
    keys_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Client keys, one a line [default: everybody may ask].")
    ] = None,
    admin_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The key of the admin API, needed where others reach HOST.")
    ] = None,
    orphan_grace: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="How long engines go on when the gateway was killed; one that is started meanwhile adopts them "
            f"[default: {GatewaySpec.orphan_grace:.0f}].",
        ),
    ] = None,
    drain: Annotated[str, typer.Option(metavar="SECONDS", help="How long requests may go on after SIGTERM.")] = "30",
    state: opt.State = None,
    device: opt.Device = None,
    capacity: opt.Capacity = None,
    directory: opt.Directory = None,
    log: opt.Log = None,
) -> None:
    """Start the engines of several models and answer for all of them at one OpenAI-compatible address.

    Models that nobody asks sleep when another one needs their memory, and a request wakes them: see docs/serve.md.
    """
    options = {"device": device, "capacity": capacity, "directory": directory, "log": log}
    settings = Settings.load(options=options)
    given: dict[str, Any] = {"host": host, "port": port, "keys_file": keys_file, "admin_key_file": admin_key_file}
    if orphan_grace is not None:
        given["orphan_grace"] = parse_seconds(orphan_grace, "--orphan-grace")
    spec = _spec(models or [], {name: value for name, value in given.items() if value is not None})
    _serve(spec, settings, Path(state) if state else default_state(settings.directory), parse_seconds(drain, "--drain"))


def _spec(models: Sequence[str], options: dict[str, Any]) -> GatewaySpec:
    """A file, then pairs; what the command line says beats the file."""
    files = [text for text in models if "=" not in text]
    if not models or len(files) > 1:
        raise InvalidArgument(f"serve: name one file of models, or models as NAME=PATH: {_EXAMPLE}")
    pairs = tuple(parse_pair(text) for text in models if "=" in text)
    base = load(Path(files[0])) if files else GatewaySpec(())
    return dataclasses.replace(base, models=base.models + pairs, **options)


def _serve(spec: GatewaySpec, settings: Settings, state: Path, drain_s: float) -> None:
    # Here and not above: `elastickv status` must not wait for a web server's imports.
    import uvloop

    from elastickv.gateway.app import create_app
    from elastickv.gateway.auth import is_loopback, load_keys
    from elastickv.gateway.fleet import EngineFleet
    from elastickv.gateway.proxy import Limits
    from elastickv.gateway.server import Server, WireLimits, allow_descriptors, listen
    from elastickv.gateway.stats import Stats
    from elastickv.gateway.watching import Watching

    keys = load_keys(spec.keys_file, spec.admin_key_file, settings.api_keys, settings.admin_key)
    if keys.admin is None and not is_loopback(spec.host):
        raise ConfigError(
            f"{spec.host} can be reached from other machines, and there is no admin key; name a file with one "
            "(--admin-key-file) or set ELASTICKV_ADMIN_KEY, or listen at 127.0.0.1"
        )
    _configure_logging(settings.log)
    allow_descriptors(spec.max_connections)
    with closing(listen(spec.host, spec.port)) as listening:
        stats = Stats()
        fleet = EngineFleet(spec, settings, state=state, on_removed=stats.forget)
        fleet.url = _url(spec.host, listening.getsockname()[1])
        watching = Watching(settings.directory, fleet.models, stats)
        app = create_app(
            fleet,
            stats,
            host=spec.host,
            keys=keys,
            drain_s=drain_s,
            limits=Limits(max_body=spec.max_body, keys_are_ours=bool(keys.clients), log_requests=spec.log_requests),
            routes=watching.routes(),
            around=watching.running(),
        )
        server = Server(app, listening, WireLimits(connections=spec.max_connections))
        _say(fleet, spec, settings, state, clients=len(keys.clients))
        gc.freeze()  # what the imports made is here to stay: looking through it again would hold requests up for 20 ms
        uvloop.run(_until_told(server, fleet, drain_s))
    if not server.started:
        raise ElasticKVError("the gateway did not start; the lines above say why")
    print("elastickv: the gateway has ended, and so have its engines", file=sys.stderr, flush=True)


async def _until_told(server: Server, fleet: EngineFleet, drain_s: float) -> None:
    def stop() -> None:
        server.force_exit = server.should_exit  # whoever asks twice is in a hurry
        server.stop(drain_s)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await server.serve()
    finally:
        await fleet.stop(0.0)  # nothing is left to do, unless there was no time for it
        if server.force_exit:
            await server.lifespan.shutdown()


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("httpx", "httpcore", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _url(host: str, port: int) -> str:
    """For clients on this machine."""
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{f'[{local}]' if ':' in local and not local.startswith('[') else local}:{port}"


def _say(fleet: EngineFleet, spec: GatewaySpec, settings: Settings, state: Path, *, clients: int) -> None:
    who = f"{clients} client keys" if clients else "no client keys: everybody who reaches it may ask"
    lines = [
        f"elastickv: {fleet.url}/v1 ({who}), page at {fleet.url}/",
        f"models: {', '.join(model.name for model in spec.models) or 'none yet; add one with `elastickv model add`'}",
        f"engines' logs in {state / 'logs'}, ledgers in {settings.directory}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
