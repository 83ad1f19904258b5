"""What lies behind a model, given up and restored without an engine; and the file that it lies in meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from elastickv.engines.weightfile import WeightFile, choose_directory
from elastickv.errors import AccessDenied, DeadlineExceeded, Unavailable

pytestmark = pytest.mark.vllm

LATER = 60.0


def model(tmp_path: Path) -> Any:
    """Two names for one matrix, a view of it, a tensor that only a function holds, and weights mapped from a file."""
    import torch

    made = torch.nn.Module()
    made.first = torch.nn.Linear(64, 64)
    made.tied = torch.nn.Linear(64, 64)
    made.tied.weight = made.first.weight
    made.register_buffer("row", made.first.weight.detach()[3])
    hidden = torch.rand(128)
    made.call = lambda: hidden
    path = tmp_path / "mapped"
    path.write_bytes(bytes(range(256)) * 4)
    mapped = torch.from_file(str(path), shared=False, size=256, dtype=torch.int32)
    made.mapped = torch.nn.Parameter(mapped.view(16, 16).t(), requires_grad=False)
    return made


def test_every_kind_goes_and_comes_back(tmp_path: Path) -> None:
    import torch

    from elastickv.engines.model_tensors import Saved, bytes_of, held_bytes, storages

    made = model(tmp_path)
    file = WeightFile(tmp_path)
    found = storages([made])
    assert len(found) == 5, "one matrix, two biases, what the function holds, and what is mapped"
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    hidden, held = made.call().clone(), held_bytes([made])
    until = time.monotonic() + LATER
    saved = [Saved(storage, tensors, file.reserve(storage.nbytes())) for storage, tensors in found]
    for one, (storage, _) in zip(saved, found, strict=True):
        file.write(one.region, bytes_of(storage), until)
    found.clear()
    for _ in range(2):
        for one in saved:
            one.release()
        assert held_bytes([made]) == 0
        for one in saved:
            one.restore(file, until)
        assert held_bytes([made]) == held
        after = made.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert torch.equal(made.call(), hidden)
        assert made.mapped.stride() == (1, 16)
        assert made.tied.weight is made.first.weight
        assert made.row.data_ptr() == made.first.weight[3].data_ptr()
    file.close()


def test_a_file_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"would stay in memory \(tmpfs\); name a directory on a disk"):
        choose_directory(Path("/dev/shm"))
    with pytest.raises(Unavailable, match="No such file or directory; name a directory on a disk"):
        WeightFile(tmp_path / "nowhere")
    with pytest.raises((AccessDenied, Unavailable), match="cannot make a file for weights in /proc"):
        WeightFile(Path("/proc"))
    file = WeightFile(tmp_path)
    region = file.reserve(5000)
    with pytest.raises(DeadlineExceeded, match=r"writing weights in .* was not done in time: 0 bytes of 4.88 KiB"):
        file.write(region, memoryview(bytes(5000)), time.monotonic() - 1)
    file.write(region, memoryview(bytes(range(250)) * 20), time.monotonic() + LATER)
    into = bytearray(5000)
    file.read(region, memoryview(into), time.monotonic() + LATER)
    assert into == bytes(range(250)) * 20
    file.forget(region)
    assert file.reserve(5000) == region, "room that was given up is used again"
    beyond = region._replace(offset=1 << 20)
    with pytest.raises(Unavailable, match=r"reading weights in .* ended after 0 bytes; was it cut?"):
        file.read(beyond, memoryview(into), time.monotonic() + LATER)
    file.close()
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["runtime"], "it never had a name"


def test_a_sleeper_that_cannot_write_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import torch

    from elastickv.engines import sleeper

    made = model(tmp_path)
    rows = {name: value.clone() for name, value in made.state_dict().items()}
    one = sleeper.Sleeper(lambda: [made], tmp_path, logging.getLogger("test"))
    size = one.resident_bytes

    def same() -> bool:
        return all(torch.equal(rows[name], value) for name, value in made.state_dict().items())

    with monkeypatch.context() as broken:
        broken.setattr(sleeper, "file_deadline", lambda size: 0.0)
        with pytest.raises(DeadlineExceeded, match=r"^elastickv: the engine stays awake: writing weights in "):
            one.sleep()
        assert not one.asleep
        assert one.resident_bytes == size
        assert same()
    one.sleep()
    assert one.asleep
    assert one.resident_bytes == 0
    with monkeypatch.context() as broken:
        broken.setattr(sleeper, "file_deadline", lambda size: 0.0)
        with pytest.raises(DeadlineExceeded, match=r"^elastickv: the engine stays asleep: reading weights in "):
            one.wake()
        assert one.asleep
        assert one.resident_bytes == 0
    one.wake()
    assert not one.asleep
    assert one.resident_bytes == size
    assert same()
    one.close()
