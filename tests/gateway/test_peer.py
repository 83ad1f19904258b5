"""Without an admin key the admin API is its own user's, and the kernel says whose a connection is."""

from __future__ import annotations

import os
import socket

import pytest

from elastickv.gateway.peer import owner_of
from gateway.front import Front

STRANGER = 65534
ORDER = b"{}"

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can open a socket as another user")


def socket_of(uid: int) -> socket.socket:
    os.seteuid(uid)
    try:
        return socket.socket()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_owner_of_a_connection_is_known_while_it_is_open(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(f"no {host} here: {error}")
        listener.listen()
        client = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
        with accepted:
            peer, own = accepted.getpeername()[:2], accepted.getsockname()[:2]
            assert owner_of(peer, own) == os.geteuid()
            assert owner_of((host, 1), own) is None
            client.close()
            assert owner_of(peer, own) is None, "the kernel lists a closed socket as root's"


def test_an_address_of_ipv4_that_an_ipv6_socket_uses() -> None:
    with socket.socket() as listener, socket.socket(socket.AF_INET6) as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        try:
            client.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        accepted, peer = listener.accept()
        with accepted:
            assert owner_of(peer, accepted.getsockname()) == os.geteuid()


@root
@pytest.mark.parametrize("closes", [False, True], ids=["waits", "closes-at-once"])
def test_another_user_of_this_machine_orders_nothing(closes: bool) -> None:
    with Front() as front:
        front.add("chat", "http://127.0.0.1:1")
        for uid, status in ((STRANGER, b"403"), (0, b"200")):
            with socket_of(uid) as stranger:
                stranger.settimeout(30)
                stranger.connect(("127.0.0.1", front.port))
                head = (
                    f"POST /admin/models/chat/sleep HTTP/1.1\r\nhost: 127.0.0.1:{front.port}\r\n"
                    f"content-type: application/json\r\ncontent-length: {len(ORDER)}\r\n\r\n"
                )
                stranger.sendall(head.encode() + ORDER)
                if uid != 0 and closes:
                    continue
                assert stranger.recv(12).split()[1] == status
        assert front.fleet.calls == [("sleep", "chat")]
