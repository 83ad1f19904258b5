"""The channels between the ranks of one engine, without an engine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from elastickv.engines.sglang import links
from elastickv.engines.sglang.channel import Channel
from elastickv.engines.sglang.links import Follower, Leader, Lobby
from elastickv.errors import AccessDenied, DeadlineExceeded, IntegrityError, Unavailable


class Decision(msgspec.Struct, array_like=True):
    """As those of the plug-in: numbers and runs of blocks."""

    runs: list[tuple[int, int]]
    more: int = 0


def meet(others: int) -> tuple[Leader, list[Follower]]:
    with Lobby() as lobby, ThreadPoolExecutor(others) as pool:
        entering = [pool.submit(Lobby.enter, lobby.address) for _ in range(others)]
        leader = lobby.wait(others)
        followers = [one.result(30) for one in entering]
    assert not Path(lobby.address).exists()
    return leader, followers


@pytest.fixture
def pair() -> Iterator[tuple[Leader, Follower]]:
    leader, (follower,) = meet(1)
    yield leader, follower
    leader.close()
    follower.close()


def test_every_rank_hears_every_decision_in_order() -> None:
    leader, followers = meet(3)
    told = [("look", Decision([], 7)), ("grow", Decision([(1, 4), (9, 1)])), ("look", Decision([], 8))]
    for kind, decision in told:
        leader.tell(kind, decision)
    for follower in followers:
        assert [follower.hear(kind, Decision) for kind, _ in told] == [decision for _, decision in told]
        follower.close()
    leader.close()


def test_a_decision_may_be_longer_than_a_buffer(pair: tuple[Leader, Follower]) -> None:
    leader, follower = pair
    long = Decision([(i, 1) for i in range(300_000)])
    telling = threading.Thread(target=leader.tell, args=("left", long))
    telling.start()
    assert follower.hear("left", Decision) == long
    telling.join(30)
    assert not telling.is_alive()


def test_ranks_that_have_come_apart_stop(pair: tuple[Leader, Follower]) -> None:
    leader, follower = pair
    leader.tell("look", Decision([]))
    with pytest.raises(IntegrityError, match="this one is at 'grow', the first one at 'look'"):
        follower.hear("grow", Decision)
    leader.tell("grow", {"runs": "none"})
    with pytest.raises(IntegrityError, match="this one is at 'grow', the first one at 'something of another form'"):
        follower.hear("grow", Decision)
    with pytest.raises(IntegrityError, match="the only rank"):
        Channel().hear("grow", Decision)


def test_a_frame_beyond_the_bound_is_not_read(pair: tuple[Leader, Follower], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pair
    monkeypatch.setattr(links, "MAX_FRAME", 8)
    leader.tell("left", Decision([(1, 1)] * 9))
    with pytest.raises(IntegrityError, match="and 8 are the most"):
        follower.hear("left", Decision)


def test_no_wait_is_without_a_deadline(pair: tuple[Leader, Follower], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pair
    monkeypatch.setattr(links, "DECISION_S", 0.1)
    monkeypatch.setattr(links, "CONNECT_S", 0.1)
    with pytest.raises(DeadlineExceeded, match=r"has not said within 0\.1 s what to do \(look\)"):
        follower.hear("look", Decision)
    with Lobby() as lobby, pytest.raises(DeadlineExceeded, match=r"0 of 2 other ranks of this engine came within 0\.1"):
        lobby.wait(2)
    for other in leader._others:
        other.settimeout(0.1)
    with pytest.raises(DeadlineExceeded, match=r"has not taken a decision \(left\)"):
        leader.tell("left", Decision([(i, 1) for i in range(1_000_000)]))


def test_the_end_of_a_rank_is_told(pair: tuple[Leader, Follower]) -> None:
    leader, follower = pair
    leader.close()
    with pytest.raises(Unavailable, match="the first rank of this engine has ended"):
        follower.hear("look", Decision)
    leader, (follower,) = meet(1)
    follower.close()
    with pytest.raises(Unavailable, match="a rank of this engine has ended"):
        leader.tell("look", Decision([]))
    leader.close()


def test_only_a_private_directory_is_entered(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(AccessDenied, match="has mode 0755"):
        Lobby.enter(str(tmp_path))
    tmp_path.chmod(0o700)
    with pytest.raises(Unavailable, match="cannot be reached"):
        Lobby.enter(str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "ranks"))
        with pytest.raises(Unavailable, match="cannot be reached: Connection refused"):
            Lobby.enter(str(tmp_path))
