"""Versions in a registry that weigh next to nothing, and a client that is killed between two writes."""

from collections.abc import Collection
from pathlib import Path
from typing import Any
from zlib import crc32

from mlflow.client import MlflowClient

from diffusion.common.files import sha256_bytes
from flows.registry.model_versions import WEIGHTS, Version, get_version
from tests.builders.small_models import write_model

WRITES = (
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "set_registered_model_tag",
    "update_model_version",
)


class Killed(BaseException):
    """As if the process were."""


def killed(*_: object, **__: object) -> None:
    """What a process does that is killed here."""
    raise Killed


def numbers(client: MlflowClient, model: str) -> list[int]:
    """Of the versions of ``model``."""
    return sorted(int(each.version) for each in client.search_model_versions(f"name = '{model}'"))


class CrashingClient(MlflowClient):
    """Dies instead of its write number ``life``, counted from 0, or right ``after`` it."""

    def __init__(self, life: int, writes: Collection[str] = WRITES, after: bool = False) -> None:
        self.life, self.writes, self.after = life, writes, after
        super().__init__()

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name not in super().__getattribute__("writes"):
            return attribute

        def write(*arguments: Any, **named: Any) -> Any:
            self.life -= 1
            if self.life < 0 and not self.after:
                raise Killed
            result = attribute(*arguments, **named)
            if self.life < 0:
                raise Killed
            return result

        return write


def add_version(
    client: MlflowClient, folder: Path, model: str, *, data: bytes | None = None, run_id: str = "0" * 32, **tags: str
) -> Version:
    """A new version of ``model`` with weights ``data``, or with small ones, below ``folder``."""
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    count = len(client.search_model_versions(f"name = '{model}'"))
    if data is None:
        folder.mkdir(parents=True, exist_ok=True)
        path = write_model(folder / f"{count}.safetensors", seed=crc32(f"{model} {count}".encode()), images=count)
        data = path.read_bytes()
    weights = folder / sha256_bytes(data) / "artifacts" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(data)
    source = weights.parents[1].as_uri()
    version = client.create_model_version(model, source, run_id, tags={WEIGHTS: sha256_bytes(data), **tags})
    return get_version(client, model, int(version.version))
