"""Captioners: what turns an image into a caption, one class each."""

import base64
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any, ClassVar

from diffusion.common.child_processes import child_environment
from diffusion.common.errors import UserError
from diffusion.common.http_client import HttpClient, HttpError, OversizedError, RetryableError, shorten_message
from diffusion.data.ingest.config import CaptionerConfig
from diffusion.data.sources.base import MAX_CHARACTERS, too_long_reason
from diffusion.data.sources.caption_files import to_text

MAX_ANSWER = 2**17
"""Maximum bytes of an answer: more than the longest caption takes, escaped in JSON."""
REJECTED_STATUSES = (400, 413, 415, 422)
"""HTTP statuses that concern one image; all others than 200 concern the endpoint."""
POLL_SECONDS = 0.05
"""Interval between checks whether a command has ended."""


class NoCaptionError(Exception):
    """The captioner has no usable caption for one image; the message says why."""


class NoAnswerError(NoCaptionError):
    """The captioner did not answer, or is broken."""


class Captioner(ABC):
    """A captioner as ``config`` describes it; thread-safe. Raises UserError for one that cannot be called at all."""

    field: ClassVar[str]
    """The field of ``ingest.captioner`` that sets it."""

    def __init__(self, config: CaptionerConfig) -> None:
        self.config = config

    def __call__(self, image: bytes) -> str:
        """Return the caption of a PNG; raises NoCaptionError, or NoAnswerError if the captioner is the reason."""
        if not (caption := (self.ask(image) or "").strip()):
            raise NoCaptionError("it has no caption for it")
        if len(caption) > MAX_CHARACTERS["caption"]:
            raise NoCaptionError(too_long_reason("caption"))
        return caption

    @abstractmethod
    def ask(self, image: bytes) -> str | None:
        """Return the answer about a PNG: a text, or nothing if there is no caption."""

    def stop(self) -> None:  # noqa: B027
        """Stop to wait for answers and to ask again."""

    def close(self) -> None:  # noqa: B027
        """Give back what it holds."""


class Command(Captioner):
    """A command, started once per image."""

    field = "command"

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        program, *_ = config.command or ("",)
        if shutil.which(program) is None:
            raise UserError(f"ingest.captioner.command: {program} is not a program: give its path")
        if missing_names := [name for name in config.environment or () if name not in os.environ]:
            raise UserError(
                f"the environment has no {missing_names[0]}, which ingest.captioner.environment names: set it, or "
                "leave it out"
            )
        self.environment = child_environment(config.environment or ())

    def ask(self, image: bytes) -> str:
        """Start the command, and read what it writes."""
        command = self.config.command or ()
        deadline, answer = time.monotonic() + self.config.seconds, b""
        with ExitStack() as stack:
            file = stack.enter_context(NamedTemporaryFile(suffix=".png"))
            file.write(image)
            file.seek(0)
            errors = stack.enter_context(TemporaryFile())
            try:
                process = subprocess.Popen(
                    [file.name if argument == "{image}" else argument for argument in command],
                    stdin=file,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self.environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(
                    f"ingest.captioner.command: {command[0]} cannot be started ({error.strerror}): give a program, or "
                    "an executable script whose first line is #! and the path of its interpreter"
                ) from error
            stack.callback(_end, process)
            assert process.stdout is not None
            output = stack.enter_context(process.stdout)
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(output, selectors.EVENT_READ)
            while True:
                # A child of the command may hold the pipe open: once it ended, what it wrote is there.
                has_ended, remaining = process.poll() is not None, deadline - time.monotonic()
                if remaining <= 0:
                    raise NoAnswerError(f"no answer within {self.config.seconds:g} s")
                if selector.select(0 if has_ended else min(remaining, POLL_SECONDS)):
                    if not (piece := os.read(output.fileno(), 2**16)):
                        break
                    answer += piece
                    if len(answer) > MAX_ANSWER:
                        raise NoCaptionError(f"its answer has more than {MAX_ANSWER} bytes")
                elif has_ended:
                    break
            try:
                code = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired as error:
                raise NoAnswerError(f"it did not end within {self.config.seconds:g} s") from error
            if code:
                errors.seek(max(errors.seek(0, os.SEEK_END) - 1000, 0))
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise NoAnswerError(f"exit code {code}{last and f': {shorten_message(last)}'}")
        try:
            return answer.decode()
        except UnicodeDecodeError as error:
            raise NoCaptionError("its answer is not UTF-8") from error


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command and its children; they may outlive it."""
    # PermissionError: only zombies are left (macOS).
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Endpoint(Captioner):
    """An HTTP endpoint, with one request per image."""

    field = "url"
    content_type = "image/png"
    answer = '{"caption": "…"}'
    """What an answer has to look like."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        self.headers = {"Content-Type": self.content_type, "Accept": "application/json"}
        self.token = ""
        if config.token_env:
            self.token = os.environ.get(config.token_env, "").strip()
            if not self.token or not self.token.isascii() or not self.token.isprintable():
                raise UserError(
                    f"the environment has no token in {config.token_env}, which ingest.captioner.token_env names: "
                    "set it to one line of ASCII"
                )
            self.headers["Authorization"] = f"Bearer {self.token}"
        self.client = HttpClient(config.seconds, connections=config.workers)

    @property
    def address(self) -> str:
        """URL of the requests."""
        return str(self.config.url)

    def encode(self, image: bytes) -> bytes:
        """Body of the request about a PNG."""
        return image

    def decode(self, answer: Any) -> Any:
        """Caption in the JSON of an answer; raises NoCaptionError, or what any lookup raises."""
        return answer["caption"]

    def ask(self, image: bytes) -> str | None:
        """Send the image, again after transient errors."""
        try:
            return to_text(self.decode(json.loads(self.client.retrying(self.config.tries)(self._post, image))))
        except RetryableError as error:
            raise NoAnswerError(f"{error}, at each of {self.config.tries} tries") from error
        except OversizedError as error:
            raise NoCaptionError(f"its answer has more than {MAX_ANSWER} bytes") from error
        except HttpError as error:
            raise NoAnswerError(str(error)) from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise NoCaptionError(f"its answer is not {self.answer}") from error

    def stop(self) -> None:
        """Stop all requests."""
        self.client.stopped.set()

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _post(self, image: bytes) -> bytes:
        body = self.encode(image)
        with self.client.stream("POST", self.address, self.headers, body, max_bytes=MAX_ANSWER) as response:
            answer = b"".join(response.pieces)
            if response.status != 200:
                reason = f"{response.reason}{self._explain(answer)}"
                raise (NoCaptionError if response.status in REJECTED_STATUSES else NoAnswerError)(reason)
            return answer

    def _explain(self, answer: bytes) -> str:
        """Message of a server that uses OpenAI's errors; empty for another."""
        try:
            message = str(json.loads(answer)["error"]["message"])
        except (ValueError, TypeError, LookupError, RecursionError):
            return ""
        # Some servers repeat the key that they reject.
        return f": {shorten_message(message.replace(self.token, '…') if self.token else message)}"


class OpenAI(Endpoint):
    """A server with OpenAI's interface for chats (vLLM, SGLang, Ollama, LM Studio), with one chat per image."""

    field = "openai"
    content_type = "application/json"
    answer = "a chat completion"

    @property
    def address(self) -> str:
        """URL of ``chat/completions``."""
        base = str(self.config.openai).rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def encode(self, image: bytes) -> bytes:
        """Chat with the prompt and the image; at temperature 0, so that equal images get equal captions if possible."""
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "text", "text": self.config.prompt}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        fields = {"model": self.config.model, "messages": messages, "temperature": 0}
        limit = {} if self.config.max_tokens is None else {"max_tokens": self.config.max_tokens}
        return json.dumps(fields | limit).encode()

    def decode(self, answer: Any) -> Any:
        """Text of the first choice; NoCaptionError for a refusal, and for a text that was cut."""
        choice = answer["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        if message.get("refusal") or reason == "content_filter":
            raise NoCaptionError("it refused to describe it")
        if reason == "length":
            raise NoCaptionError("its answer was cut: ask for fewer words in the prompt, or raise max_tokens")
        return message["content"]


CAPTIONERS: tuple[type[Captioner], ...] = (Command, Endpoint, OpenAI)
"""All captioners."""


def make_captioner(config: CaptionerConfig) -> Captioner:
    """Make the captioner that ``config`` sets."""
    return next(kind(config) for kind in CAPTIONERS if getattr(config, kind.field) is not None)
