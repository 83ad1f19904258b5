"""Every setting of elastickv, and the only place that reads the process environment.

Each setting is one row of VARIABLES. Where several places give a value, the command line beats the environment, the
environment beats the file named by ELASTICKV_CONFIG, and the file beats the default. All of it is read and checked at
once by Settings.load(); what the rest of the program sees is frozen. The native core is given values and never looks
at the environment.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from elastickv import forms
from elastickv.errors import ConfigError, InvalidArgument
from elastickv.units import (
    format_size,
    parse_seconds,
    parse_seconds_or_never,
    parse_size,
    parse_size_or_none,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CONFIG_VARIABLE",
    "VARIABLES",
    "Settings",
    "Variable",
    "default_host_capacity",
    "is_enabled",
    "process_environment",
]

PREFIX: Final = "ELASTICKV"
CONFIG_VARIABLE: Final = "ELASTICKV_CONFIG"


@dataclass(frozen=True)
class Variable:
    """One setting: its field in Settings, where it may be given, how it is read and written, and what it means."""

    field: str
    parse: Callable[[str, str], Any]
    default: str
    doc: str
    write: Callable[[Any], str] = str
    name: str = ""
    secret: bool = False
    """Never handed to a child, and no option of the command line, where all users of the machine can read it."""

    @property
    def variable(self) -> str:
        """The environment variable."""
        return self.name or f"{PREFIX}_{self.key.upper()}"

    @property
    def key(self) -> str:
        """The key in the file, and (with dashes) the option of the command line."""
        return {"enabled": "enabled", "directory": "dir"}.get(self.field, self.field)

    @property
    def option(self) -> str:
        """The option of the command line. A secret has none."""
        return "--" + self.key.replace("_", "-")


VARIABLES: Final[tuple[Variable, ...]] = (
    Variable(
        "enabled",
        forms.switch,
        "0",
        "Whether the plug-in manages the engine that loads it.",
        forms.write_switch,
        PREFIX,
    ),
    Variable(
        "directory",
        forms.directory,
        "$XDG_RUNTIME_DIR/elastickv, or /dev/shm/elastickv-UID",
        "The private directory (mode 0700) of the ledgers. Everybody who shares a device names the same one.",
    ),
    Variable(
        "device", forms.device, "auto", "host, a GPU's number or UUID; auto takes the device that the engine runs on."
    ),
    Variable(
        "capacity",
        forms.positive_size,
        "host: half of the memory; a GPU: all of it but the headroom",
        "Bytes of the device that the tenants share. The first one on the device decides; the others must agree.",
    ),
    Variable(
        "headroom",
        parse_size,
        "512MiB",
        "Bytes of a GPU that nobody is lent, where no capacity is given: for what libraries load later.",
    ),
    Variable(
        "static",
        forms.static,
        "auto",
        "What is leased for weights, graphs and activations before an engine loads: none, checkpoint (the size of its "
        "files, corrected once it is loaded), bytes a rank, or auto (checkpoint on a GPU, none on the host).",
    ),
    Variable(
        "start_wait",
        parse_seconds,
        "120",
        "Seconds that an engine's start, or its waking up, waits for neighbours to make room.",
    ),
    Variable(
        "name",
        forms.name,
        "engine-PID",
        "The tenant's name on the ledger. Limits are kept under a name that was given.",
    ),
    Variable("floor", parse_size, "0", "Bytes guaranteed to this tenant and never lent to another."),
    Variable(
        "limit",
        parse_size_or_none,
        "what the ledger has for the name, or none",
        "The most bytes that this tenant may hold, or none. Given here it replaces the limit kept on the ledger.",
        forms.write_or("none"),
    ),
    Variable("weight", forms.integer(1, 1000), "1", "This tenant's part when tenants compete, 1 to 1000."),
    Variable(
        "priority", forms.integer(-1000, 1000), "0", "Tenants with a higher priority keep their cached prefixes longer."
    ),
    Variable("virtual", forms.positive_size, "the capacity", "Bytes of address space reserved for an engine's cache."),
    Variable(
        "page",
        forms.page,
        "64KiB, or more for a large virtual size",
        "Page size on the host, a power of two. On a GPU the driver decides (2 MiB).",
    ),
    Variable(
        "max_extent",
        forms.positive_size,
        "128MiB on a GPU, one page on the host",
        "The most bytes that one mapping covers. Mappings grow with use, up to this.",
    ),
    Variable("idle_release", parse_seconds, "2", "Seconds without work until mapped free memory is given back."),
    Variable(
        "cache_release",
        parse_seconds_or_never,
        "never",
        "Seconds without work until cached prefixes are given back too, or never.",
        forms.write_or("never"),
    ),
    Variable(
        "cache_limit",
        parse_size_or_none,
        "none",
        "The most bytes that cached prefixes alone may hold, or none. The oldest go first. 0: nothing beyond use.",
        forms.write_or("none"),
    ),
    Variable("give_back_wait", forms.milliseconds, "20", "Milliseconds that an allocation waits for its neighbours."),
    Variable("stock", parse_size, "one extent", "Bytes that are kept mapped ahead of demand."),
    Variable(
        "hold_windows",
        forms.hold_windows,
        "auto",
        "Blocks behind a sliding window stay until the request ends: auto, where kernels may read them; always.",
    ),
    Variable(
        "sleep_dir",
        forms.directory,
        "the temporary directory, or /var/tmp, whichever is on a disk",
        "Where an engine on the host keeps its weights while it sleeps: a directory on a disk.",
    ),
    Variable(
        "api_keys",
        forms.text,
        "",
        "Keys of the gateway's clients, separated by commas, beside its keys_file.",
        secret=True,
    ),
    Variable("admin_key", forms.text, "", "The key of the gateway's admin API, in place of a file.", secret=True),
    Variable("log", forms.log, "info", f"How much is logged: {', '.join(forms.LOG_LEVELS)}."),
)

_BY_FIELD: Final = {variable.field: variable for variable in VARIABLES}
_BY_VARIABLE: Final = {variable.variable: variable for variable in VARIABLES}
_BY_KEY: Final = {variable.key: variable for variable in VARIABLES}


@dataclass(frozen=True)
class Settings:
    """What was decided. Sizes are bytes, times are seconds unless the name says otherwise; None: as the docs say."""

    directory: Path
    enabled: bool = False
    device: str = "auto"
    capacity: int | None = None
    headroom: int = 512 * 1024 * 1024
    """Libraries go on loading kernels and growing workspaces while an engine serves, and that shows as unmanaged memory
    only once it is taken. Half a GiB is an estimate of what comes between two looks at a GPU; it is less than 1 % of
    one with 80 GB."""
    static: str | int = "auto"
    start_wait: float = 120.0
    name: str | None = None
    floor: int = 0
    limit: int | None = None
    weight: int = 1
    priority: int = 0
    virtual: int | None = None
    page: int | None = None
    max_extent: int | None = None
    idle_release: float = 2.0
    cache_release: float | None = None
    cache_limit: int | None = None
    give_back_wait: int = 20
    """Milliseconds."""
    stock: int | None = None
    hold_windows: str = "auto"
    sleep_dir: Path | None = None
    api_keys: str = field(default="", repr=False)
    admin_key: str = field(default="", repr=False)
    log: str = "info"
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """Names of the fields that some place gave a value, as opposed to the defaults."""

    def __post_init__(self) -> None:
        for low, high in (("floor", "limit"), ("floor", "capacity"), ("floor", "virtual")):
            small, large = getattr(self, low), getattr(self, high)
            if large is not None and small > large:
                raise ConfigError(
                    f"{low} {format_size(small)} is more than {high} {format_size(large)}; "
                    f"lower {_BY_FIELD[low].option} or raise {_BY_FIELD[high].option}",
                    **{low: small, high: large},
                )

    @property
    def set_limit(self) -> bool:
        """Whether `limit` was given here. If not, the limit that the ledger keeps for the name stays."""
        return "limit" in self.given

    @property
    def tenant_name(self) -> str:
        """The name, or one made from this process's id."""
        return self.name if self.name is not None else f"engine-{os.getpid()}"

    @classmethod
    def load(
        cls,
        *,
        options: Mapping[str, str | None] | None = None,
        arguments: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Reads every place and checks all of it. ConfigError names the variable, option, argument or key.

        `options` are texts from the command line and `arguments` are values from a Python caller, both by field
        name; None in either means "not given". `environ` replaces the process environment.
        """
        environ = os.environ if environ is None else environ
        _refuse_unknown(environ)
        texts: dict[str, tuple[str, str]] = {}
        path = environ.get(CONFIG_VARIABLE, "")
        if path:
            texts.update(_from_file(Path(path)))
        for variable in VARIABLES:
            text = environ.get(variable.variable, "")
            if text:
                texts[variable.field] = (text, variable.variable)
        for name, value in (arguments or {}).items():
            if value is not None:
                texts[name] = (_text(value), name)
        for name, option in (options or {}).items():
            if option is not None:
                texts[name] = (option, _BY_FIELD[name].option)
        values: dict[str, Any] = {"directory": _default_directory(environ)}
        values.update({name: _parse(_BY_FIELD[name], text, what) for name, (text, what) in texts.items()})
        return cls(**values, given=frozenset(texts))

    def environment(self) -> dict[str, str]:
        """The variables that make a child process decide the same: all given ones but secrets, and the directory."""
        passed = {*self.given, "directory", *(f.name for f in fields(self) if f.name != "given" and self._changed(f))}
        ordered = [variable for variable in VARIABLES if variable.field in passed and not variable.secret]
        return {variable.variable: variable.write(getattr(self, variable.field)) for variable in ordered}

    def _changed(self, spec: Any) -> bool:
        return bool(getattr(self, spec.name) != spec.default)


def is_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the plug-in is switched on. Looks at nothing else, so an engine without elastickv is left alone."""
    text = (os.environ if environ is None else environ).get(PREFIX, "")
    return bool(_parse(_BY_FIELD["enabled"], text, PREFIX)) if text else False


def process_environment() -> dict[str, str]:
    """A copy of the process environment without secrets, to hand to a child with changes."""
    secrets = {variable.variable for variable in VARIABLES if variable.secret}
    return {name: value for name, value in os.environ.items() if name not in secrets}


def default_host_capacity() -> int:
    """Half of this machine's memory (or of its control group's), in bytes, a multiple of 2 MiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file():
        text = group.read_text(encoding="ascii").strip()
        total = min(total, int(text)) if text.isdecimal() else total
    unit = 2 * 1024 * 1024
    return total // 2 // unit * unit


def _default_directory(environ: Mapping[str, str]) -> Path:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime, "elastickv").absolute() if runtime else Path(f"/dev/shm/elastickv-{os.getuid()}")


def _parse(variable: Variable, text: str, what: str) -> Any:
    try:
        return variable.parse(text, what)
    except InvalidArgument as error:
        raise ConfigError(error.message, **error.attributes) from None


def _text(value: object) -> str:
    return forms.write_switch(value) if isinstance(value, bool) else str(value)


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = [*_BY_VARIABLE, CONFIG_VARIABLE]
    for name in environ:
        if name.startswith(f"{PREFIX}_") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the variables are {', '.join(known)}"
            raise ConfigError(f"{name}: no such variable; {hint}", what=name)


def _from_file(path: Path) -> dict[str, tuple[str, str]]:
    where = f"{CONFIG_VARIABLE}={path}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{where}: cannot read the file: {reason}; correct the path or unset it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: the file is not TOML: {error}") from None
    texts: dict[str, tuple[str, str]] = {}
    for key, value in table.items():
        variable = _BY_KEY.get(key)
        if variable is None:
            raise ConfigError(f"{where}: no such key {key!r}; the keys are {', '.join(_BY_KEY)}", what=key)
        if not isinstance(value, (str, int, float)):
            raise ConfigError(f"{where}: {key} must be a text, a number, true or false", what=key)
        texts[variable.field] = (_text(value), f"{key} in {path}")
    return texts
