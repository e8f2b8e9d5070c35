"""Requests to the studio as its page sends them, without a browser."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from diffusion.process.samplers import SamplingConfig

USER, PASSWORD = "darkroom", "test-secret"


@contextmanager
def logged_in(address: str, timeout: float = 60) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=timeout) as client:
        client.post("login", data={"username": USER, "password": PASSWORD}).raise_for_status()
        yield client


def upload(client: httpx.Client, payload: bytes, name: str = "image.png") -> dict[str, Any]:
    """Upload a file; returns what stands for it in an event."""
    [path] = client.post("gradio_api/upload", files={"files": (name, payload)}).raise_for_status().json()
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def trigger(
    client: httpx.Client,
    chosen: Callable[[Mapping[str, Any]], bool],
    values: Mapping[str, Any],
    session: str | None = None,
) -> dict[str, Any]:
    """Trigger the one event that is ``chosen``, with ``values`` by the label or else the type of a component.

    Returns its output, whose ``error`` is a message if it failed.
    """
    config = client.get("config").raise_for_status().json()
    components = {component["id"]: component for component in config["components"]}
    [event] = filter(chosen, config["dependencies"])
    data = []
    for number in event["inputs"]:
        properties, kind = components[number]["props"], components[number]["type"]
        data.append(values.get(properties.get("label"), values.get(kind, properties.get("value"))))
    body = {"data": data, "fn_index": event["id"], "session_hash": session or uuid4().hex}
    if not event["queue"]:
        answer: dict[str, Any] = client.post("gradio_api/run/event", json=body).json()
        return answer
    client.post("gradio_api/queue/join", json=body).raise_for_status()
    query = {"session_hash": body["session_hash"]}
    with client.stream("GET", "gradio_api/queue/data", params=query) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ") or "{}")
            if message.get("msg") == "process_completed":
                output: dict[str, Any] = message["output"]
                return output
    raise AssertionError("the stream ended before the event")


def named(api_name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Choose the event with a name."""
    return lambda event: event["api_name"] == api_name


def peak_memory(pid: int | str = "self") -> int:
    """Peak resident memory of a process so far, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [text] = [line for line in lines if line.startswith("VmHWM")]
    return int(text.split()[1]) * 1024


def with_header(weights: Path, sampling: SamplingConfig, **changes: object) -> Any:
    """What the studio shows for the model in the file ``weights`` with another header."""
    from flows.studio.generate import StudioSource

    source = StudioSource.from_file(weights, sampling)
    header = source.model.header.model_copy(update=changes)
    return StudioSource(replace(source.model, header=header), source.name, source.origin, sampling)
