"""The frames of the control socket, whatever stands in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv import errors
from elastickv.control.protocol import (
    Answer,
    Fault,
    Hello,
    MalformedFrame,
    Request,
    bytes_of,
    encode,
    failure,
    read_answer,
    read_request,
    size_of,
)

FAMILY = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ElasticKVError) and kind is not errors.ElasticKVError
]
WITHOUT_CODE = {errors.EngineRefused}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(["op", "v", "id", "tenant", "device", "limit", "wait", "now", "interval", "count", "bytes"])
operations = st.sampled_from(["hello", "list", "get", "set", "watch", "fit", "trim", "forget", "stop"])


@given(frame=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_request_or_an_error(frame: bytes) -> None:
    try:
        assert isinstance(read_request(frame), Request)
    except errors.InvalidArgument as error:
        answer = json.loads(failure(frame, error))
        assert (answer["ok"], answer["error"]["code"]) == (False, "invalid")


@given(request=st.dictionaries(fields, values, max_size=6), op=operations | values)
def test_any_object_is_a_request_or_an_error(request: dict[str, Any], op: Any) -> None:
    frame = json.dumps({**request, "op": op}).encode()
    refused: errors.InvalidArgument | None = None
    try:
        assert isinstance(read_request(frame), Request)
    except errors.InvalidArgument as error:
        refused = error
    assert not isinstance(refused, MalformedFrame)
    if refused is not None:
        assert json.loads(failure(frame, refused))["error"]["exit_code"] == 2


@pytest.mark.parametrize("kind", FAMILY)
def test_an_error_comes_out_as_the_class_it_was(kind: type[errors.ElasticKVError]) -> None:
    sent = kind("what was tried", bytes=1 << 40, where=errors)
    line = encode(None, None, error=sent)
    assert b"\n" not in line[:-1]
    fault = read_answer(line).error
    assert fault is not None
    got = fault.error()
    if kind not in WITHOUT_CODE:
        assert type(got) is (errors.InvalidArgument if kind is errors.ConfigError else kind)
        assert str(got) == "what was tried"
    assert got.attributes["bytes"] == 1 << 40
    assert isinstance(got.attributes["where"], str)
    assert fault.exit_code == kind.exit_code


def test_an_answer_is_one_line_whatever_is_in_it() -> None:
    line = encode(Hello(id="a\nb"), {"text": "line\nbreak", "limit": None})
    assert line.count(b"\n") == 1
    assert read_answer(line) == Answer(ok=True, v=1, id="a\nb", result={"text": "line\nbreak", "limit": None})


def test_what_is_no_answer_is_an_error() -> None:
    for line in (b"", b"[]", b"{}", b"\xff", b'{"ok":true,"result":' + b"[" * 100000 + b"]" * 100000 + b"}"):
        with pytest.raises(errors.InvalidArgument, match="the control server's line is no answer"):
            read_answer(line)


def test_sizes_are_bytes_or_texts() -> None:
    assert [size_of(value, "limit") for value in (None, "none", 5, "8GiB")] == [None, None, 5, 8 << 30]
    assert bytes_of("1MiB", "bytes") == 1 << 20
    with pytest.raises(errors.InvalidArgument, match="bytes: 'none' is not a size"):
        bytes_of("none", "bytes")
    assert Fault.of(errors.NotFound("x", seconds=1.5)).attributes == {"seconds": 1.5}
