"""Files of models and what is wrong with them; states and the moves that there are."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from elastickv.errors import ConfigError, IntegrityError, InvalidArgument
from elastickv.gateway.spec import ModelSpec, load, model_from_mapping, parse_pair
from elastickv.gateway.states import MOVES, Machine, Move, State

GOOD = """
[gateway]
port = 9000
orphan_grace = "5s"
[models.chat]
path = "/models/chat"
args = ["--max-model-len", 8192]
floor = "4GiB"
limit = "none"
sleep = "idle"
sleep_after = "5m"
env = { OMP_NUM_THREADS = 1 }
[models.code]
command = ["serve", "{port}"]
stop_after = 600
start = false
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    spec = load(written(tmp_path, GOOD))
    assert (spec.port, spec.host, spec.orphan_grace) == (9000, "127.0.0.1", 5.0)
    chat, code = spec.models
    assert chat == ModelSpec(
        "chat",
        "/models/chat",
        args=("--max-model-len", "8192"),
        floor=4 << 30,
        sleep="idle",
        sleep_after=300.0,
        env=(("OMP_NUM_THREADS", "1"),),
    )
    assert (code.stop_after, code.start, code.command) == (600.0, False, ("serve", "{port}"))


def test_a_model_survives_its_record(tmp_path: Path) -> None:
    for model in load(written(tmp_path, GOOD)).models:
        assert msgspec.json.decode(msgspec.json.encode(model), type=ModelSpec) == model


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no model"),
        ("[models.a]", "model a: no path"),
        ("[models.a]\npaht='x'", "no such key 'paht'; did you mean path"),
        ("[model.a]\npath='x'", "did you mean models"),
        ("[models]\na = 3", "no table"),
        ("[models.a]\npath=3", "path = 3; write a text"),
        ("[models.a]\npath='x'\nreplicas=0", "replicas = 0"),
        ("[models.a]\npath='x'\nreplicas=true", "replicas = True; write a whole number"),
        ("[models.a]\npath='x'\nfloor='big'", "floor"),
        ("[models.a]\npath='x'\nsleep='often'", "one of pressure, idle, never"),
        ("[models.a]\npath='x'\nargs='--x'", "write a list"),
        ("[models.a]\npath='x'\nenv=['A=1']", "write a table"),
        ("[models.a]\npath='x'\nqueue=0", "queue = 0; write at least 1"),
        ("[models.a]\naddress=['localhost:1']", "write http://HOST:PORT"),
        ("[models.'a/b']\npath='x'", "use 1 to 48 letters"),
        ("[gateway]\nport=70000\n[models.a]\npath='x'", "port = 70000"),
        ("[models.a\n", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        load(written(tmp_path, text))
    assert says in wrong.value.message


def test_no_file_and_no_pair(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the file"):
        load(tmp_path / "none.toml")
    assert parse_pair("a=b=c") == ModelSpec("a", "b=c")
    for text in ("a", "=b", "a="):
        with pytest.raises(InvalidArgument):
            parse_pair(text)


def test_a_body_of_a_request_is_read_alike() -> None:
    assert model_from_mapping("a", {"path": "x", "floor": 5}, "here") == ModelSpec("a", "x", floor=5)
    with pytest.raises(ConfigError, match="here: no such key 'name'"):
        model_from_mapping("a", {"name": "a", "path": "x"}, "here")


def test_only_moves_of_the_table_are_taken() -> None:
    now, seen = [100.0], list[Move]()
    machine = Machine({State.STARTING: 5.0}, seen.append, clock=lambda: now[0])
    assert machine.remaining is None
    machine.move(State.STARTING, "a request")
    now[0] += 2.0
    assert (machine.lasted, machine.remaining) == (2.0, 3.0)
    machine.move(State.READY, "it serves")
    assert [(m.origin, m.to, m.lasted) for m in seen] == [
        (State.STOPPED, State.STARTING, 0.0),
        (State.STARTING, State.READY, 2.0),
    ]
    with pytest.raises(IntegrityError, match="cannot go from ready to waking"):
        machine.move(State.WAKING, "nonsense")
    assert machine.state is State.READY
    assert list(machine.history) == seen


def test_from_every_state_there_is_a_way_to_ready_and_to_stopped() -> None:
    for goal in (State.READY, State.STOPPED):
        reached = {goal}
        while more := {state for state in State if state not in reached and MOVES[state] & reached}:
            reached |= more
        assert reached == set(State)
