"""GPUs as NVML names them: order, names, memory. NVML is a stand-in that says what a file of the test says."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.errors import ConfigError, DriverError, NotFound
from elastickv.memory import gpu
from native_build import standin_libraries

A, B, C = (f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "abc")
M1, M2, M3 = (f"MIG-{digit * 8}-0000-0000-0000-000000000000" for digit in "123")
GIB = 1 << 30
THREE = [f"gpu {name} {80 * GIB} {GIB} NVIDIA H100" for name in (A, B, C)]
INSTANCES = [f"mig {B} 1 0 {M1} {10 * GIB} 0", f"mig {B} 2 0 {M2} {10 * GIB} 5", f"mig {C} 1 0 {M3} {10 * GIB} 0"]

Say = Callable[..., Path]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin_libraries(tmp_path_factory.mktemp("libraries"))


@pytest.fixture
def say(libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say(*lines)` is what NVML says from then on, in this process."""
    import pynvml

    path = tmp_path / "nvml.txt"
    monkeypatch.setenv("STANDIN_NVML", str(path))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(libraries / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(gpu, "_started_in", 0)

    def write(*lines: str) -> Path:
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    write(*THREE)
    return write


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [A, B, C]),
        ("", []),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("0,2,-1,1", [A, C]),
        ("-1", []),
        ("0,3,1", [A]),
        ("1,x,0", [B]),
        ("0,0", []),
        ("1,2,1", []),
        (C, [C]),
        (f"{C},{A}", [C, A]),
        ("GPU-b", [B]),
        ("gpu-BBBB,GPU-a", [B, A]),
        ("GPU-", []),
        (f"{A},GPU-d,{B}", [A]),
        (f"0,{C}", [A, C]),
        ("none", []),
    ],
)
def test_visible_devices(say: Say, variable: str | None, expected: list[str]) -> None:
    assert gpu.visible_devices({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}) == expected


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [A]),
        ("0", [A]),
        ("1", [M1]),
        ("0,1", [A]),
        ("2,1", [M3]),
        (M2, [M2]),
        ("MIG-2", [M2]),
        (f"{M2},{A},{M1}", [M2]),
        (f"MIG-{B}/2/0", [M2]),
        (f"MIG-{B}/2/1", []),
        (f"MIG-{A}/1/0", []),
        (B, [M1]),
        ("MIG-", []),
    ],
)
def test_visible_devices_with_mig_instances(say: Say, variable: str | None, expected: list[str]) -> None:
    say(*THREE, f"divided {B}", f"divided {C}", *INSTANCES)
    assert gpu.visible_devices({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}) == expected


def test_a_machine_of_mig_instances_only_shows_the_first(say: Say) -> None:
    say(THREE[1], f"divided {B}", *INSTANCES[:2])
    assert gpu.visible_devices({}) == [M1]
    say(THREE[1], f"divided {B}")
    assert gpu.visible_devices({}) == []


def test_the_process_environment_counts_where_none_is_given(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.visible_devices() == [B]


def test_numbers_of_gpus_that_differ_need_an_order(say: Say) -> None:
    say(*THREE[:2], f"gpu {C} {16 * GIB} 0 Tesla T4")
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": "0"}):
        with pytest.raises(ConfigError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs"):
            gpu.visible_devices(environ)
    assert gpu.visible_devices({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == [A, B, C]
    assert gpu.visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a"}) == [C, A]
    assert gpu.visible_devices({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_a_gpu_that_this_user_may_not_use_is_not_counted(say: Say) -> None:
    say(*THREE, f"hidden {A}")
    assert gpu.visible_devices({"CUDA_VISIBLE_DEVICES": "1"}) == [C]


def test_memory_and_name(say: Say) -> None:
    assert gpu.device_memory(A) == (80 * GIB, GIB)
    assert gpu.device_name(A) == "NVIDIA H100"
    say(f"gpu {A} {80 * GIB} {3 * GIB} NVIDIA H100", f"divided {A}", f"mig {A} 1 0 {M1} {10 * GIB} 7")
    assert gpu.device_memory(A) == (80 * GIB, 3 * GIB)
    assert gpu.device_memory(M1) == (10 * GIB, 7)


def test_memory_of_a_process(say: Say) -> None:
    say(*THREE, f"process {A} 71 {2 * GIB}", f"process {A} 72 -1", f"process {B} 73 5")
    assert gpu.process_memory(A, 71) == 2 * GIB
    assert gpu.process_memory(A, 72) is None  # the driver does not tell
    assert gpu.process_memory(A, 73) is None  # as in a container, where ids are others
    assert gpu.process_memory(C, 71) is None


def test_an_unknown_device_lists_those_that_are_there(say: Say) -> None:
    say(*THREE[:2], f"divided {B}", INSTANCES[0])
    with pytest.raises(NotFound, match=f"there is no GPU '{C}' on this machine; there are {A}, {B}, {M1}"):
        gpu.device_memory(C)
    say()
    with pytest.raises(NotFound, match="there is none"):
        gpu.device_name(C)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("nvmlDeviceGetCount_v2", lambda: gpu.visible_devices({})),
        ("nvmlDeviceGetMemoryInfo", lambda: gpu.device_memory(A)),
        ("nvmlDeviceGetName", lambda: gpu.device_name(A)),
        ("nvmlDeviceGetHandleByUUID", lambda: gpu.device_memory(A)),
        ("nvmlDeviceGetComputeRunningProcesses_v3", lambda: gpu.process_memory(A, 1)),
    ],
)
def test_a_call_that_fails_says_which_and_why(say: Say, function: str, call: Callable[[], object]) -> None:
    call()
    say(*THREE, f"fail {function} 999")
    with pytest.raises(DriverError, match=r"(listing|reading) .* failed: NVML says Unknown Error; look at"):
        call()


def test_without_a_driver_the_error_names_what_is_missing(say: Say) -> None:
    say().unlink()
    with pytest.raises(NotFound, match=r"libnvidia-ml\.so\.1 cannot be used \(Driver Not Loaded\); install the NVIDIA"):
        gpu.visible_devices({})


def test_without_the_library_or_the_package_the_error_names_it(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom elastickv.memory import gpu\nfrom elastickv.errors import NotFound\n"
        "for hide in (False, True):\n"
        "    sys.modules.pop('pynvml', None)\n"
        "    if hide: sys.modules['pynvml'] = None\n"
        "    try: gpu.device_memory('GPU-1')\n"
        "    except NotFound as error: print(error)\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    library, package = done.stdout.splitlines()
    assert "libnvidia-ml.so.1 cannot be used (NVML Shared Library Not Found)" in library
    assert "nvidia-ml-py" in package
    assert "pip install" in package


def test_the_loader_finds_the_library_and_nothing_is_loaded_before_it_is_needed(say: Say, libraries: Path) -> None:
    program = (
        "import sys\nimport elastickv, elastickv.memory, elastickv.cli\nfrom elastickv.memory import gpu\n"
        "assert 'pynvml' not in sys.modules\n"
        "print(gpu.visible_devices())\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libstandin_nvml' in maps, 'libcuda' in maps or 'libstandin_cuda' in maps)\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "CUDA_VISIBLE_DEVICES": "1,0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [repr([B, A]), "True False"]


LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
CONTEXTS = """
import ctypes, sys
from pathlib import Path
cuda = ctypes.CDLL("libcuda.so.1")
cuda.standin_reset(1, 0, 0, 0)
import elastickv
from elastickv._core import Ledger
from elastickv.cli import main
from elastickv.errors import NotFound
from elastickv.memory import gpu
from control.serving import serving

def call(*words):
    sys.argv = ["elastickv", *words]
    try:
        main()
    except SystemExit as leaving:
        print(words[0], leaving.code or 0)

directory, model = sys.argv[1:]
(name,) = gpu.visible_devices()
with elastickv.open_device("cuda:0", capacity="64MiB", directory=directory) as device:
    assert device.view().device == name
    place = ["--dir", directory]
    chat = Ledger.open(directory, name).join("chat")
    call("status", *place)
    call("top", *place, "--plain", "--count", "1")
    call("limit", "chat", "8MiB", "--timeout", "0.01", *place)
    call("trim", "chat", "2MiB", "--timeout", "0.01", *place)
    call("plan", model, *place)
    call("plan", model, "--device", "cuda:0")
    with serving(Path(directory)) as served, served.client() as client:
        print("control", *(view.device for view in client.list()))
    print("torch", "torch" in sys.modules)  # doctor looks at the engines, which import it
    call("doctor", *place)
    chat.close()
try:
    elastickv.open_device("1", directory=directory)
except NotFound as error:
    print(error)
print("contexts", cuda.standin_calls(b"cuDevicePrimaryCtxRetain"), cuda.standin_calls(b"cuCtxSetCurrent"))
"""


def test_who_only_looks_makes_no_cuda_context(say: Say, libraries: Path, tmp_path: Path) -> None:
    name = "GPU-10111213-1415-1617-1819-1a1b1c1d1e00"
    say(f"gpu {name} {80 * GIB} {GIB} NVIDIA H100")
    tests = str(Path(__file__).parent)
    search = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": search}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    header = b'{"model.norm.weight": {"dtype": "BF16", "shape": [1024], "data_offsets": [0, 2048]}}'
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2048))
    command = [sys.executable, "-c", CONTEXTS, str(tmp_path / "ledgers"), str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "contexts 0 0"
    assert "torch False" in lines
    assert f"there is no GPU 1 in this process; it sees {name}" in lines[-2]
    codes = [line for line in lines if line.split(" ")[0] in ("status", "top", "plan", "limit", "trim", "control")]
    # Nobody answers for the tenant, which has no engine, and the ledger's 64 MiB are too few for the model.
    ran = ["status 0", "top 0", "limit 7", "trim 7", "plan 1", "plan 0", f"control {name}"]
    assert codes == ran
    assert "79 GiB free of 80 GiB" in done.stdout


@pytest.mark.vllm
def test_vllm_for_cpus_chooses_the_cpu_all_the_same(say: Say, libraries: Path) -> None:
    """vLLM asks NVML for its platform: neither the package nor a GPU that it shows may change a CPU build's."""
    pytest.importorskip("vllm")
    program = "from vllm.platforms import current_platform\nprint(current_platform.device_type)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "cpu"
