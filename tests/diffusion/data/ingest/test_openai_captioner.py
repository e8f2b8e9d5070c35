"""Captions by a server with OpenAI's interface: what it is asked, and what its refusals, limits and lies cost."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import CaptionerConfig, IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest
from tests.builders.http_server import QuietHandler, serving
from tests.builders.ingested import records

Answer = tuple[int, bytes]
TOKEN = "test-secret"


def completion(text: object, reason: str = "stop", **message: object) -> Answer:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text} | message}
    return 200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


class Chats:
    """A server that answers as ``reply`` says, given the number of the request, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        self.tokens: set[str | None] = set()
        self.reply: Callable[[int], Answer] = lambda number: completion(f"a blob, {number}")
        self.url = ""


@pytest.fixture
def chats() -> Iterator[Chats]:
    chats, lock = Chats(), threading.Lock()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                chats.asked.append(question)
                chats.paths.add(self.path)
                chats.tokens.add(self.headers["Authorization"])
                number = len(chats.asked)
            status, body = chats.reply(number)
            self.answer(body, "application/json", status)

    with serving(Handler) as address:
        chats.url = f"{address}/v1"
        yield chats


def run(images: Path, tmp_path: Path, chats: Chats, **fields: Any) -> IngestResult:
    settings = {"openai": chats.url, "model": "tiny-vl", "prompt": "Describe it.", "tries": 2, "seconds": 5} | fields
    config = IngestConfig.model_validate({"source": str(images), "size": 8, "captioner": settings})
    return ingest(tmp_path / "data" / "blobs", config)


def test_each_image_is_one_chat_with_prompt_and_pixels(images: Path, tmp_path: Path, chats: Chats) -> None:
    result = run(images, tmp_path, chats, max_tokens=80)
    rows = [row for row in records(tmp_path / "data" / "blobs") if row["outcome"] == "kept"]
    assert result.captions is not None
    assert result.captions.requests == len(rows) == len(chats.asked)
    assert {row["caption"] for row in rows} == {f"a blob, {number + 1}" for number in range(len(rows))}
    assert chats.paths == {"/v1/chat/completions"}
    pictures = set()
    for question in chats.asked:
        assert (question["model"], question["max_tokens"], question["temperature"]) == ("tiny-vl", 80, 0)
        [message] = question["messages"]
        text, image_part = message["content"]
        assert text == {"type": "text", "text": "Describe it."}
        head, _, data = image_part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (8, 8)
        pictures.add(image.tobytes())
    assert len(pictures) == len(rows)


@pytest.mark.parametrize("change", [{"model": "other-vl"}, {"prompt": "In one word."}, {"max_tokens": 9}])
def test_answers_are_kept_until_model_or_prompt_change(
    images: Path, tmp_path: Path, chats: Chats, change: dict[str, Any]
) -> None:
    run(images, tmp_path, chats)
    first = len(chats.asked)
    run(images, tmp_path, chats, workers=2, tries=3)
    assert len(chats.asked) == first
    run(images, tmp_path, chats, **change)
    assert len(chats.asked) == 2 * first


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion(None, refusal="I cannot help with that"), "it refused to describe it"),
        (completion("", "content_filter"), "it refused to describe it"),
        (completion("a blob that", "length"), "its answer was cut"),
        (completion(None), "it has no caption for it"),
        (completion([{"type": "text", "text": "a"}]), "its answer is not a chat completion"),
        ((200, b'{"choices": []}'), "its answer is not a chat completion"),
        ((200, b"[" * 90_000), "its answer is not a chat completion"),
        ((200, b"<html>"), "its answer is not a chat completion"),
        ((200, b" " * 2**18), "its answer has more than"),
        (completion("x" * 20_000), "caption"),
        ((400, b'{"error": {"message": "image too small"}}'), "HTTP 400 Bad Request: image too small"),
    ],
)
def test_what_is_no_caption_is_counted_with_its_reason(
    images: Path, tmp_path: Path, chats: Chats, answer: Answer, reason: str
) -> None:
    chats.reply = lambda number: answer if number % 4 == 0 else completion("a blob")
    counts = run(images, tmp_path, chats, workers=1).captions
    assert counts is not None
    assert counts.failed == counts.requests // 4
    [text] = counts.reasons
    assert reason in text


def test_a_throttled_request_is_sent_again(images: Path, tmp_path: Path, chats: Chats) -> None:
    chats.reply = lambda number: (429, b"{}") if number % 8 == 0 else completion("a blob")
    counts = run(images, tmp_path, chats, workers=1, tries=3).captions
    assert counts is not None
    assert counts.failed == 0
    assert len(chats.asked) > counts.requests


def test_a_rejected_token_is_named_without_its_value(
    images: Path, tmp_path: Path, chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", TOKEN)
    message = json.dumps({"error": {"message": f"Incorrect API key provided: {TOKEN}"}}).encode()
    chats.reply = lambda _: (401, message)
    with pytest.raises(UserError, match=r"HTTP 401 Unauthorized: Incorrect API key provided: …") as caught:
        run(images, tmp_path, chats, token_env="CAPTION_KEY")
    assert TOKEN not in str(caught.value)
    assert chats.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "settings",
    [
        {"openai": "http://h/v1", "prompt": "p"},
        {"openai": "http://h/v1", "model": "m"},
        {"openai": "ftp://h/v1", "model": "m", "prompt": "p"},
        {"openai": "http://user:wrong@h/v1", "model": "m", "prompt": "p"},
        {"openai": "http://h/v1", "url": "http://h", "model": "m", "prompt": "p"},
        {"openai": "http://h/v1", "model": "m", "prompt": "p", "environment": ["HOME"]},
        {"url": "http://h", "version": "1", "prompt": "p"},
        {"url": "http://h"},
    ],
)
def test_incomplete_or_contradicting_settings_are_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CaptionerConfig.model_validate(settings)


def test_the_identity_of_other_captioners_is_as_before() -> None:
    config = CaptionerConfig(url="http://127.0.0.1:1/caption", version="one")
    assert config.identity == "one (8b11cab6e009)"
