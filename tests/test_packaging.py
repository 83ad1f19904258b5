"""What is built and shipped, and that the README's example runs as it stands."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import elastickv

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL = 2 * 1000 * 1000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
        timeout=1200,
        env=environment,
    )
    (built,) = folder.iterdir()
    return built


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_what_it_must(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        stub = archive.read("elastickv/_core.pyi").decode()
    compiled = [name for name in names if re.search(r"\.(so|pyd|dylib|a|o)\b", name)]
    assert len(compiled) == 1, compiled
    assert compiled[0].startswith("elastickv/_core.")
    assert "elastickv/py.typed" in names
    assert "class Ledger" in stub
    folder = ROOT / "src/elastickv"
    sources = [*folder.rglob("*.py"), *(folder / "gateway/page").iterdir(), *folder.rglob("*.json")]
    assert {str(path.relative_to(ROOT / "src")) for path in sources} <= set(names)
    others = [name for name in names if not name.startswith("elastickv")]
    assert others == []
    assert not [name for name in names if re.search(r"tests?/|standin|stand_in|\.[ch]pp$", name)]


@pytest.mark.slow
def test_one_wheel_for_every_python_from_3_12_on(wheel: Path) -> None:
    tag = wheel.name.split("-")[2:4]
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert tag == (["cp312", "abi3"] if sys.version_info >= (3, 12) else [version, version])


@pytest.mark.slow
def test_the_wheels_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*(;.*)?$", metadata, re.MULTILINE)
    always = {name for name, condition in needed if "extra" not in condition}
    served = {"aiohttp", "httptools", "httpx", "python-multipart", "starlette", "uvicorn", "uvloop"}
    assert always == {"msgspec", "nvidia-ml-py", "prometheus-client", "rich", "tomli", "typer"} | served
    assert "[console_scripts]\nelastickv=elastickv.cli:main" in points.replace(" = ", "=")
    assert "[vllm.general_plugins]\nelastickv=elastickv.engines.vllm:register" in points.replace(" = ", "=")


@pytest.mark.slow
def test_the_module_names_no_cuda_library_to_the_loader(wheel: Path, tmp_path: Path) -> None:
    """libcuda.so.1 is found when it runs, so that the same wheel works without a GPU."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if "/_core." in name and name.endswith(".so")]
        module = Path(archive.extract(name, tmp_path))
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert "cuda" not in needed
    assert "torch" not in needed


@pytest.mark.slow
def test_the_module_takes_no_symbol_of_cuda_or_pytorch(wheel: Path, tmp_path: Path) -> None:
    """So the same file imports next to any PyTorch, and next to none."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if "/_core." in name and name.endswith(".so")]
        module = Path(archive.extract(name, tmp_path))
    nm = shutil.which("nm")
    assert nm, "no nm; install binutils"
    taken = subprocess.run([nm, "-D", "--undefined-only", str(module)], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in taken.stdout.splitlines()}
    assert "dlopen" in {symbol.partition("@")[0] for symbol in symbols}
    assert [symbol for symbol in symbols if re.search(r"^cu[A-Z]|^cuda|^nv|torch|^_ZNK?(2at|3c10)", symbol)] == []


@pytest.mark.slow
def test_the_wheel_works_alone_and_says_what_a_gpu_would_take(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where no other package is: the core needs none, not PyTorch, NumPy or NVIDIA's libraries."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        f"import sys; sys.path = [{str(tmp_path)!r}] + [p for p in sys.path if 'site-packages' not in p]\n"
        "from elastickv import _core\nfrom elastickv.errors import NotFound\n"
        "assert _core.open_driver('host').device_id == 'host'\n"
        "try: _core.open_driver('cuda:0')\n"
        "except NotFound as error: print(error)\n"
    )
    environment = {"LD_LIBRARY_PATH": str(tmp_path / "none"), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    if not done.stdout:
        pytest.skip("this machine has a GPU")
    assert "libcuda.so.1" in done.stdout
    assert "install the NVIDIA driver" in done.stdout


def test_importing_the_package_imports_no_engine_and_no_numpy() -> None:
    script = (
        "import sys, elastickv, elastickv.cli, elastickv.memory, elastickv.engines\n"
        "print(sorted({'vllm', 'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_version_is_the_distributions() -> None:
    assert elastickv.__version__ == importlib.metadata.version("elastickv")
    assert f"## {elastickv.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'opendevice'; it has ElasticKVError, __version__, open_"):
        _ = elastickv.opendevice  # type: ignore[attr-defined]
    assert set(dir(elastickv)) == set(elastickv.__all__)


def test_the_example_in_the_readme_runs(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    environment = {**os.environ, "ELASTICKV_DIR": str(tmp_path / "ledgers")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second, chat, _ = done.stdout.splitlines()
    assert first == "while chat holds them, code gets None"
    assert second == "after that, code gets 900 blocks, and the device says:"
    assert int(re.fullmatch(r"  chat holds (\d+) MiB", chat)[1]) <= 31  # type: ignore[index]


def test_links_of_the_docs_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_option_is_in_the_docs() -> None:
    import typer

    from elastickv.cli import app

    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    missing = []
    for verb, command in verbs.items():
        section = page.partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        missing += [f"{verb} {option}" for option in options if option not in section]
    assert missing == []
