"""The official client, as it is, against the gateway."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from elastickv.gateway.auth import Keys
from gateway.front import Front, Limits
from gateway.raw_engine import RawEngine, as_json, event, stream

KEY = "a-client-key"
BASE = {"id": "cmpl-1", "created": 1, "model": "chat"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def chat(text: str) -> dict[str, object]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {**BASE, "object": "chat.completion", "choices": [choice], "usage": USAGE}


def chat_chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return event({**BASE, "object": "chat.completion.chunk", "choices": [choice]})


def completion(text: str, finish: str | None = "stop") -> dict[str, object]:
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return {**BASE, "object": "text_completion", "choices": [choice]}


@pytest.fixture
def engine() -> Iterator[RawEngine]:
    with RawEngine() as engine:
        yield engine


@pytest.fixture
def client(engine: RawEngine) -> Iterator[openai.OpenAI]:
    with Front(keys=Keys.of([KEY]), limits=Limits(keys_are_ours=True)) as front:
        front.add("chat", engine.url)
        with openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
            yield client


MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def test_chat(client: openai.OpenAI, engine: RawEngine) -> None:
    engine.replies[b"/v1/chat/completions"] = as_json(chat("Hello"))
    answer = client.chat.completions.create(model="chat", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_chat_streamed(client: openai.OpenAI, engine: RawEngine) -> None:
    parts = [chat_chunk("Hel"), chat_chunk("lo"), chat_chunk("", "stop"), b"data: [DONE]\n\n"]
    engine.replies[b"/v1/chat/completions"] = stream(*parts)
    chunks = client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hel", "lo", ""]


def test_completions(client: openai.OpenAI, engine: RawEngine) -> None:
    engine.replies[b"/v1/completions"] = as_json(completion("four"))
    assert client.completions.create(model="chat", prompt="2+2").choices[0].text == "four"
    parts = [event(completion("fo", None)), event(completion("ur")), b"data: [DONE]\n\n"]
    engine.replies[b"/v1/completions"] = stream(*parts)
    chunks = client.completions.create(model="chat", prompt="2+2", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "four"


def test_embeddings_of_an_engine_that_has_none(client: openai.OpenAI, engine: RawEngine) -> None:
    body = {"error": {"message": "no embeddings here", "type": "BadRequestError", "param": None, "code": 400}}
    engine.replies[b"/v1/embeddings"] = as_json(body, b"400 Bad Request")
    with pytest.raises(openai.BadRequestError, match="no embeddings here"):
        client.embeddings.create(model="chat", input="hi")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chat"]
    assert client.models.retrieve("chat").owned_by == "elastickv"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_our_own_errors_are_the_clients_own_exceptions(client: openai.OpenAI, engine: RawEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another-key").models.list()
    engine.replies[b"/v1/chat/completions"] = stream(chat_chunk("Hel"), then="die")
    chunks = client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)
    assert next(chunks).choices[0].delta.content == "Hel"
    with pytest.raises(openai.APIError, match="failed in the midst of the answer"):
        next(chunks)
