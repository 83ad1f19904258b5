"""`elastickv serve` and `elastickv model`: what they refuse, and what they do to a running gateway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastickv.errors import (
    AccessDenied,
    AlreadyExists,
    ConfigError,
    EngineRefused,
    InvalidArgument,
    NotFound,
)
from gateway.fleets import command
from gateway.served import Gateway, gateway
from support import Outcome

Cli = Callable[..., Outcome]


@pytest.fixture
def running(directory: Path, tmp_path: Path) -> Iterator[Gateway]:
    path = tmp_path / "models.toml"
    path.write_text(f"[models.a]\ncommand = {json.dumps(list(command('--static', '10MiB')))}\n")
    with gateway(directory, str(path)) as serving:
        serving.wait(a="ready")
        yield serving


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ([], InvalidArgument, "name one file of models"),
        (["a.toml", "b.toml"], InvalidArgument, "name one file of models"),
        (["nothing.toml"], ConfigError, "cannot read the file"),
        (["a=/no/such/folder"], ConfigError, "nothing at /no/such/folder"),
        (["a=b", "a=c"], ConfigError, "named more than once: a"),
        (["a b=c"], InvalidArgument, "use 1 to 48 letters"),
        (["a=b", "--port", "99999"], ConfigError, "0 to 65535"),
        (["a=b", "--host", "0.0.0.0"], ConfigError, "--admin-key-file"),
        (["a=b", "--admin-key-file", "nothing"], ConfigError, "nothing"),
        (["a=b", "--orphan-grace", "soon"], InvalidArgument, "--orphan-grace"),
        (["a=b", "--drain", "-1"], InvalidArgument, "--drain"),
        (["a=b", "--host", "203.0.113.7", "--port", "0"], InvalidArgument, "203.0.113.7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_one_line_and_a_code(
    cli: Cli, directory: Path, arguments: list[str], kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "203.0.113.7" in arguments:  # an address of nobody here, with a key
        monkeypatch.setenv("ELASTICKV_ADMIN_KEY", "a-key-for-this-test")
    outcome = cli("serve", *arguments, "--dir", directory)
    assert outcome.code == kind.exit_code  # type: ignore[attr-defined]
    assert outcome.err.startswith("error: ")
    assert says in outcome.err
    assert outcome.err.count("\n") == 1


def test_models_are_listed_put_to_sleep_and_woken(running: Gateway, directory: Path, cli: Cli) -> None:
    def model(*arguments: object) -> Outcome:
        return cli("model", *arguments, "--dir", directory)

    listed = model("list")
    assert (listed.code, listed.out.split()[:5]) == (0, ["NAME", "STATE", "SINCE", "RUNNING", "WAITING"])
    assert "ready" in listed.out
    assert model("sleep", "a").out == "a: asleep (it was asked to; gave back 10 MiB and holds 0 bytes)\n"
    (shown,) = json.loads(model("list", "--json").out)["models"]
    assert (shown["name"], shown["state"], shown["tenants"]) == ("a", "asleep", ["a"])
    assert model("wake", "a").out == "a: ready (it was asked to)\n"
    unknown = model("sleep", "nobody")
    assert (unknown.code, unknown.err) == (NotFound.exit_code, "error: there is no model 'nobody'; there are: a\n")


def test_models_are_added_and_removed(running: Gateway, directory: Path, cli: Cli) -> None:
    def model(*arguments: object) -> Outcome:
        return cli("model", *arguments, "--dir", directory)

    added = model("add", "b", f"command={json.dumps(list(command()))}", "floor=1MiB")
    assert (added.code, added.out.splitlines()[-1]) == (0, "b: ready (all replicas serve)")
    assert running.ask("b").status_code == 200
    assert model("add", "b=x").code == AlreadyExists.exit_code
    assert model("remove", "b").out == "b: removed\n"
    assert running.ask("b").status_code == 404
    wrong = model("add", "c=x", "flor=1")
    assert (wrong.code, "did you mean floor?" in wrong.err) == (InvalidArgument.exit_code, True)
    assert model("add", "c=x", "floor").code == InvalidArgument.exit_code


def test_a_model_that_cannot_be_started_is_told_with_its_last_lines(
    running: Gateway, directory: Path, cli: Cli
) -> None:
    failed = cli("model", "add", "c", f"command={json.dumps(list(command('--fail')))}", "--dir", directory)
    assert failed.code == EngineRefused.exit_code
    assert "exit code 3" in failed.err
    assert "cannot find the weights" in failed.err
    odd = ["sh", "-c", "echo 'ValueError: unknown tag [/INST] in [red] template'; exit 3"]
    assert cli("model", "add", "d", f"command={json.dumps(odd)}", "--dir", directory).code == EngineRefused.exit_code
    listed = cli("model", "list", "--dir", directory)
    assert listed.code == 0
    assert "[/INST]" in listed.out, "what an engine says is no markup"
    assert running.ask("a").status_code == 200


def test_nobody_there_and_a_wrong_key(running: Gateway, directory: Path, tmp_path: Path, cli: Cli) -> None:
    absent = cli("model", "list", "--dir", tmp_path / "none")
    assert absent.code == NotFound.exit_code
    assert "start one with `elastickv serve`" in absent.err
    assert cli("model", "list", "--url", "http://127.0.0.1:9").code == NotFound.exit_code
    assert cli("model", "list", "--url", "nonsense").code == NotFound.exit_code
    for text in ("", "one\ntwo\n"):
        key = tmp_path / "key"
        key.write_text(text)
        key.chmod(0o600)
        refused = cli("model", "list", "--admin-key-file", key, "--dir", directory)
        assert refused.code == ConfigError.exit_code
    key.chmod(0o644)
    readable = cli("model", "list", "--admin-key-file", key, "--dir", directory)
    assert readable.code == AccessDenied.exit_code
    assert "chmod 600" in readable.err


def test_with_an_admin_key_nothing_goes_without_it(
    directory: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key = tmp_path / "models.toml", tmp_path / "key"
    path.write_text(f"[models.a]\nstart = false\ncommand = {json.dumps(list(command()))}\n")
    key.write_text("the-admin-key # of this test\n")
    key.chmod(0o600)
    with monkeypatch.context() as inside:
        inside.setenv("ELASTICKV_ADMIN_KEY", "the-admin-key")
        serving = Gateway(directory, str(path))
    try:
        serving.wait(a="stopped")
        assert cli("model", "list", "--dir", directory).code == AccessDenied.exit_code
        assert cli("model", "list", "--dir", directory, "--admin-key-file", key).code == 0
        monkeypatch.setenv("ELASTICKV_ADMIN_KEY", "the-admin-key")
        assert cli("model", "list", "--dir", directory).code == 0
    finally:
        serving.process.terminate()
        serving.process.wait(60)
