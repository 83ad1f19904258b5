"""The control socket under fire: its server, which may be killed too, a hostile client, and an honest one beside it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path

from chaos.choices import stream
from elastickv.config import Settings
from elastickv.control.client import Client
from elastickv.control.place import SOCKET_NAME
from elastickv.control.server import ControlServer
from elastickv.errors import ElasticKVError

MANY = 100
PATIENCE_S = 10.0
ANSWERS = {"NotFound", "InvalidArgument", "DeadlineExceeded", "AlreadyExists", "Unavailable"}


def serve(directory: str, pipe: Connection) -> None:
    """The server, until the conductor is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def until_told() -> None:
        async with ControlServer(Settings.load(arguments={"directory": directory})):
            pipe.send(("serving",))
            while not pipe.poll():
                await asyncio.sleep(0.2)

    asyncio.run(until_told())


def _attack(path: Path, kind: str) -> None:
    """One misdeed; whatever the server answers is its own affair."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(2.0)
        client.connect(str(path))
        if kind == "half a frame":
            client.sendall(b'{"v": 1, "id": 1, "op": "li')
            time.sleep(0.3)
        elif kind == "garbage":
            client.sendall(bytes(range(256)) * 64 + b"\n")
        elif kind == "a frame without an end":
            client.sendall(b"x" * (8 << 20))
        elif kind == "questions and no ears":
            client.sendall(b'{"v": 1, "id": 1, "op": "list"}\n' * 2000)
            time.sleep(0.3)
        elif kind == "silence":
            time.sleep(0.5)


ATTACKS = ["connect and leave", "half a frame", "garbage", "a frame without an end", "questions and no ears", "silence"]


def intrude(directory: str, seed: int, pipe: Connection) -> None:
    """Attacks for ever, a dozen connections at a time now and then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    choose = stream(seed, "intruder")
    path = Path(directory) / SOCKET_NAME
    while not pipe.poll(choose.uniform(0.05, 0.4)):
        try:
            if choose.random() < 0.1:
                crowd = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(MANY)]
                for one in crowd:
                    one.settimeout(0.2)
                    one.connect(str(path))
                for one in crowd:
                    one.close()
            else:
                _attack(path, choose.choice(ATTACKS))
        except OSError:
            continue  # thrown out, or the server has just been killed


def ask(directory: str, kind: str, name: str, size: int | None) -> tuple[str, float]:
    """An honest request: "ok" or the error's name, and its seconds."""
    began = time.monotonic()
    try:
        with Client(directory, timeout=PATIENCE_S) as client:
            if kind == "socket limit":
                client.set_limit(name, size, wait=1.0)
            else:
                client.list()
    except ElasticKVError as error:
        known = type(error).__name__
        return known if known in ANSWERS else f"unexpected {known}: {error}", time.monotonic() - began
    return "ok", time.monotonic() - began
