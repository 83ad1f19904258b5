"""Settings: where they come from, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from elastickv import config
from elastickv.config import VARIABLES, Settings
from elastickv.errors import ConfigError
from support import CONFIGURATION_PAGE, configuration_table, table_of

SIZES = "bytes (1000000), KiB, MiB, GiB, TiB (512MiB, 1.5GiB), k, m, g, t (the same: 2g is 2GiB), kB, MB, GB, TB"


@pytest.fixture(autouse=True)
def no_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_defaults() -> None:
    settings = Settings.load(environ={})
    assert settings.directory == Path(f"/dev/shm/elastickv-{os.getuid()}")
    assert (settings.enabled, settings.device, settings.floor, settings.limit) == (False, "auto", 0, None)
    assert (settings.page, settings.idle_release, settings.give_back_wait) == (None, 2.0, 20)
    assert not settings.given
    assert not settings.set_limit
    assert settings.tenant_name == f"engine-{os.getpid()}"


def test_the_runtime_directory_of_the_user_is_preferred() -> None:
    assert Settings.load(environ={"XDG_RUNTIME_DIR": "/run/user/7"}).directory == Path("/run/user/7/elastickv")


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "elastickv.toml"
    file.write_text('floor = "1MiB"\nlimit = 4194304\nweight = 3\npriority = 2\nenabled = true\nidle_release = 0.5\n')
    environ = {"ELASTICKV_CONFIG": str(file), "ELASTICKV_LIMIT": "8MiB", "ELASTICKV_WEIGHT": "5"}
    settings = Settings.load(options={"weight": "7", "name": None}, environ=environ)
    assert settings.floor == 1 << 20
    assert settings.limit == 8 << 20
    assert settings.weight == 7
    assert settings.priority == 2
    assert settings.enabled
    assert settings.idle_release == 0.5
    assert settings.page is None
    assert settings.set_limit


def test_arguments_of_a_caller_may_be_values() -> None:
    settings = Settings.load(arguments={"capacity": 1 << 20, "floor": "64KiB", "limit": None}, environ={})
    assert (settings.capacity, settings.floor, settings.set_limit) == (1 << 20, 65536, False)


def test_a_limit_of_none_is_an_order_and_no_limit_is_not() -> None:
    assert Settings.load(environ={"ELASTICKV_LIMIT": "none"}).set_limit
    assert not Settings.load(environ={}).set_limit


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"ELASTICKV": "maybe"}, "ELASTICKV: 'maybe' is neither on nor off; write 1, on, 0 or off"),
        ({"ELASTICKV_FLOOR": "x"}, f"ELASTICKV_FLOOR: 'x' is not a size; write {SIZES}"),
        ({"ELASTICKV_LIMIT": "-1"}, f"ELASTICKV_LIMIT: '-1' is not a size; write {SIZES}, none"),
        ({"ELASTICKV_CAPACITY": "0"}, "ELASTICKV_CAPACITY: '0' must be more than 0 bytes"),
        ({"ELASTICKV_PAGE": "5000"}, "ELASTICKV_PAGE: '5000' must be a power of two of at least 4 KiB"),
        ({"ELASTICKV_WEIGHT": "0"}, "ELASTICKV_WEIGHT: '0' must be a whole number from 1 to 1000"),
        ({"ELASTICKV_LOG": "loud"}, "ELASTICKV_LOG: 'loud' is not a level; write one of debug, info, warning, error"),
        ({"ELASTICKV_DIR": " "}, "ELASTICKV_DIR: the directory is empty; write an absolute path"),
        (
            {"ELASTICKV_NAME": "a b"},
            "ELASTICKV_NAME: 'a b' is not a name; write 1 to 63 letters, digits, '.', '_' or '-'",
        ),
        (
            {"ELASTICKV_DEVICE": "tpu"},
            "ELASTICKV_DEVICE: 'tpu' is not a device; write host, auto, a GPU's number (0, cuda:0) or its UUID "
            "(GPU-..., MIG-...)",
        ),
        (
            {"ELASTICKV_FLOOR": "2GiB", "ELASTICKV_LIMIT": "1GiB"},
            "floor 2 GiB is more than limit 1 GiB; lower --floor or raise --limit",
        ),
        (
            {"ELASTICKV_FLOOR": "2GiB", "ELASTICKV_CAPACITY": "1GiB"},
            "floor 2 GiB is more than capacity 1 GiB; lower --floor or raise --capacity",
        ),
        ({"ELASTICKV_FLOR": "1"}, "ELASTICKV_FLOR: no such variable; did you mean ELASTICKV_FLOOR?"),
        (
            {"ELASTICKV_CONFIG": "/nowhere.toml"},
            "ELASTICKV_CONFIG=/nowhere.toml: cannot read the file: No such file or directory; correct the path or "
            "unset it",
        ),
    ],
)
def test_bad_values_name_the_variable_the_value_and_the_way_out(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(environ=environ)
    assert str(caught.value) == text
    assert caught.value.exit_code == 2


def test_an_option_and_an_argument_are_called_by_their_own_names() -> None:
    with pytest.raises(ConfigError, match=r"^--dir: the directory is empty"):
        Settings.load(options={"directory": ""}, environ={})
    with pytest.raises(ConfigError, match=r"^capacity: 'lots' is not a size"):
        Settings.load(arguments={"capacity": "lots"}, environ={})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("floor = [", "the file is not TOML: "),
        ("flor = 1", "no such key 'flor'; the keys are enabled, dir, device, "),
        ("floor = [1]", "floor must be a text, a number, true or false"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        Settings.load(environ={"ELASTICKV_CONFIG": str(file)})
    assert str(caught.value).startswith(f"ELASTICKV_CONFIG={file}: {text}")


def test_a_bad_value_in_the_file_names_key_and_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('floor = "x"')
    with pytest.raises(ConfigError, match=re.escape(f"floor in {file}: 'x' is not a size")):
        Settings.load(environ={"ELASTICKV_CONFIG": str(file)})


def test_a_bad_value_that_is_overridden_does_not_count() -> None:
    assert Settings.load(options={"floor": "1MiB"}, environ={"ELASTICKV_FLOOR": "x"}).floor == 1 << 20


def test_a_child_decides_the_same(tmp_path: Path) -> None:
    given = {
        "enabled": "1",
        "directory": str(tmp_path),
        "name": "chat",
        "floor": "1.5MiB",
        "limit": "none",
        "cache_release": "never",
        "cache_limit": "0",
        "idle_release": "20ms",
        "give_back_wait": "0.5s",
        "device": "host",
        "log": "debug",
    }
    parent = Settings.load(options=given, environ={"ELASTICKV_LIMIT": "1MiB", "ELASTICKV_WEIGHT": "9"})
    environment = parent.environment()
    assert Settings.load(environ={"ELASTICKV_LIMIT": "1MiB", **environment}) == parent
    assert environment["ELASTICKV_LIMIT"] == "none"
    assert "ELASTICKV_PRIORITY" not in environment


def test_a_changed_copy_is_passed_on_too() -> None:
    settings = dataclasses.replace(Settings.load(environ={}), name="other", enabled=True)
    assert settings.environment()["ELASTICKV_NAME"] == "other"
    assert settings.environment()["ELASTICKV"] == "1"


def test_secrets_are_neither_shown_nor_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ELASTICKV_API_KEYS", "ELASTICKV_ADMIN_KEY"):
        monkeypatch.setenv(name, "a-secret-of-mine")
    settings = Settings.load()
    assert settings.api_keys == settings.admin_key == "a-secret-of-mine"
    assert "a-secret-of-mine" not in repr(settings)
    assert "a-secret-of-mine" not in settings.environment().values()
    assert "a-secret-of-mine" not in config.process_environment().values()


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings.load(environ={}).floor = 1  # type: ignore[misc]


def test_the_switch_alone_is_looked_at_when_it_is_off() -> None:
    assert not config.is_enabled({"ELASTICKV_FLOOR": "x"})
    assert not config.is_enabled({"ELASTICKV": "off"})
    assert config.is_enabled({"ELASTICKV": "1"})
    with pytest.raises(ConfigError):
        config.is_enabled({"ELASTICKV": "2"})


def test_every_field_has_a_row_and_its_default_is_the_one_that_is_told() -> None:
    fields = {field.name: field for field in dataclasses.fields(Settings) if field.name != "given"}
    assert {variable.field for variable in VARIABLES} == set(fields)
    for variable in VARIABLES:
        default = fields[variable.field].default
        if variable.field == "directory" or (default is None and variable.default not in ("none", "never")):
            continue
        assert variable.parse(variable.default, variable.field) == default, variable.field


def test_the_table_in_the_docs_is_the_registry() -> None:
    table = table_of(CONFIGURATION_PAGE)
    assert table == configuration_table(), "run scripts/docs"
    assert all(f"| `{variable.variable}` | " in table for variable in VARIABLES)


def test_half_of_the_memory_is_a_sensible_size() -> None:
    half = config.default_host_capacity()
    assert 0 < half < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert half % (2 << 20) == 0
