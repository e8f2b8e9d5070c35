"""Numbered objects on S3, ``PLACE/00000001.json`` and so on, written once: a writer that loses reads the winner's."""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import ConflictError
from diffusion.common.files import canonical_json
from flows.environment import settings
from flows.storage.s3 import ListedObject, Location, Store
from flows.storage.s3_errors import MissingObjectError

NAME = re.compile(r"([0-9]{8})\.json")
MAX_CLAIM_BYTES = 4096  # larger objects are not claims


def object_name(number: int) -> str:
    """Return the name of the object with this number."""
    return f"{number:08d}.json"


def first_free(numbers: Collection[int]) -> int:
    """Return the lowest free number; a foreign object with a far higher number is ignored."""
    return next(number for number in range(1, len(numbers) + 2) if number not in numbers)


@dataclass(frozen=True)
class NumberedObjects:
    """The numbered objects directly below ``place``."""

    place: Location
    store: Store

    def list_objects(self) -> tuple[ListedObject, ...]:
        """List all objects below ``place``, including foreign ones."""
        return tuple(self.store.list_objects(self.place.bucket, self.place.key("")))

    def number(self, entry: ListedObject) -> int:
        """Return the number of a listed object; 0 if its name holds none."""
        match = NAME.fullmatch(entry.key.removeprefix(self.place.key("")))
        return int(match[1]) if match else 0

    def numbers(self) -> set[int]:
        """Return all numbers that are taken."""
        return set(map(self.number, self.list_objects())) - {0}

    def require_conditional_puts(self) -> None:
        """Raise UserError if the server ignores If-None-Match."""
        self.store.require_conditional_puts(self.place.bucket, self.place.prefix.partition("/")[0])

    def get(self, number: int, max_bytes: int | None = None) -> bytes | None:
        """Return the bytes of an object, None if it is not there; raises UserError if there are over ``max_bytes``."""
        try:
            return self.store.get(self.place.bucket, self.place.key(object_name(number)), max_bytes)
        except MissingObjectError:
            return None

    def put(self, number: int, data: bytes) -> None:
        """Create an object; raises ConflictError if one of that number holds other bytes."""
        key = self.place.key(object_name(number))
        self.store.put_once(self.place.bucket, key, data, content_type="application/json")


class Claim(Config):
    """Claim of a process, with the server's name of what it made, such as a run ID."""

    made: str


class Claims(NumberedObjects):
    """Claims to be the first creator of an object, ``s3://BUCKET/claims/MODEL/KEY/00000001.json`` and so on.

    MLflow allows any number of runs with the same tag, but only one process can create a claim. A claim counts while
    the object it names exists and is valid; after that the next number is free.
    """

    @classmethod
    def of(cls, model: str, key: str) -> "Claims":
        """Return the claims to create the object ``key`` of a registered model."""
        return cls(Location(settings().bucket) / "claims" / model / key, Store())

    def holder(self, is_valid: Callable[[str], bool]) -> str | None:
        """Return what the first ``is_valid`` claim names; None if there is none."""
        return next((name for _, name in self._claims() if name is not None and is_valid(name)), None)

    def claim(self, name: str, is_valid: Callable[[str], bool]) -> str:
        """Claim to be the first, with ``name`` as the name of the object; returns the name in the first claim."""
        self.require_conditional_puts()
        while True:
            numbers = set[int]()
            for number, winner in self._claims():
                if winner is not None and is_valid(winner):
                    return winner
                numbers.add(number)
            with suppress(ConflictError):
                self.put(first_free(numbers), canonical_json(Claim(made=name).model_dump()).encode())
                return name

    def _claims(self) -> Iterator[tuple[int, str | None]]:
        for entry in self.list_objects():
            if number := self.number(entry):
                try:
                    data = self.get(number) if entry.size <= MAX_CLAIM_BYTES else None
                    yield number, Claim.model_validate_json(data or b"").made
                except ValidationError:
                    yield number, None
