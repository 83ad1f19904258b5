"""Answers scrapes over HTTP: prometheus-client's own application, on the standard library's server."""

from __future__ import annotations

import errno
import socket
import threading
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from elastickv.errors import AccessDenied, AlreadyExists, ElasticKVError, InvalidArgument

__all__ = ["MetricsServer", "cannot_listen"]

SILENCE_S: Final = 10.0
"""A client that says nothing for so long is left."""


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Says nothing: a scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)


class MetricsServer:
    """Serves a collector's metrics from a thread of its own, until close(). Each client has a thread."""

    def __init__(self, collector: Collector, host: str, port: int) -> None:
        """Listens at once. AlreadyExists if the port is in use, InvalidArgument for a host that is none of ours,
        AccessDenied where the system does not allow it."""
        registry = CollectorRegistry(auto_describe=True)
        registry.register(collector)
        try:
            self._server = _Server(host, port)
        except OSError as error:
            raise cannot_listen(error, host, port) from error
        self._server.set_app(make_wsgi_app(registry))
        self.port: int = self._server.server_port
        """The port it listens on; for port 0 the one that the system chose."""
        self._thread = threading.Thread(target=self._server.serve_forever, name="elastickv-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the serving; scrapes that run are let go."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def cannot_listen(error: OSError, host: str, port: int) -> ElasticKVError:
    """Says why, and what to do; for whatever listens at an address that a user gave."""
    what = f"cannot listen on {host} port {port}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return AlreadyExists(f"{what}; choose another with --port", port=port)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(f"{what}; choose a port above 1023 with --port", port=port)
    return InvalidArgument(f"{what}; give an address of this machine with --host", host=host)
