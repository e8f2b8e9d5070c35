"""Numbered objects on S3, ``PLACE/00000001.json`` and so on, each written once: of several writers one succeeds.

To create an object with If-None-Match is one write. The ledgers of models, the heads of data sets and claims stand on
it: whoever loses finds what the winner wrote, and decides anew.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pydantic import ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import Held
from diffusion.common.files import canonical_json
from flows.environment import settings
from flows.storage.s3 import Listed, Location, Store
from flows.storage.s3_errors import Missing

NAME = re.compile(r"([0-9]{8})\.json")
LARGEST_CLAIM = 4096
"""Bytes of a claim, at most; a larger object is none."""


def object_name(number: int) -> str:
    """Return the name of the object with this number."""
    return f"{number:08d}.json"


def first_free(numbers: Collection[int]) -> int:
    """Return the least number that is not taken: a foreign object with a number far off is passed over."""
    return next(number for number in range(1, len(numbers) + 2) if number not in numbers)


@dataclass(frozen=True)
class NumberedObjects:
    """The numbered objects directly below ``place``."""

    place: Location
    store: Store

    def listed(self) -> tuple[Listed, ...]:
        """List all objects below ``place``, whatever they are."""
        return tuple(self.store.list_objects(self.place.bucket, self.place.key("")))

    def number(self, listed: Listed) -> int:
        """Return the number of a listed object; 0 if its name holds none."""
        found = NAME.fullmatch(listed.key.removeprefix(self.place.key("")))
        return int(found[1]) if found else 0

    def numbers(self) -> set[int]:
        """Return all numbers that are taken."""
        return set(map(self.number, self.listed())) - {0}

    def require_conditional_puts(self) -> None:
        """Raise UserError if the server overwrites what If-None-Match is to protect."""
        self.store.require_conditional_puts(self.place.bucket, self.place.prefix.partition("/")[0])

    def get(self, number: int, most: int | None = None) -> bytes | None:
        """Return the bytes of an object; None if it is not there. Raises UserError if they are more than ``most``."""
        try:
            return self.store.get(self.place.bucket, self.place.key(object_name(number)), most)
        except Missing:
            return None

    def put(self, number: int, data: bytes) -> None:
        """Create an object; raises Held if one of that number holds other bytes."""
        key = self.place.key(object_name(number))
        self.store.put_once(self.place.bucket, key, data, content_type="application/json")


class Claim(Config):
    """The name that a server gave to what somebody made, such as a run's ID."""

    made: str


@dataclass(frozen=True)
class Claims(NumberedObjects):
    """Claims to have been the first to make one thing, ``s3://BUCKET/claims/MODEL/KEY/00000001.json`` and so on.

    MLflow finds runs by their tags and lets any number of them have the same one; only one process can create a claim.
    A claim counts while what it names is there and valid: after that the next number is free.
    """

    @classmethod
    def of(cls, model: str, key: str) -> "Claims":
        """Return the claims to make what ``key`` identifies for a registered model."""
        return cls(Location(settings().bucket) / "claims" / model / key, Store())

    def holder(self, valid: Callable[[str], bool]) -> str | None:
        """Return what the first ``valid`` claim names; None if there is none."""
        return self._first(valid)[0]

    def claim(self, made: str, valid: Callable[[str], bool]) -> str:
        """Claim to have ``made`` the thing; returns what was made by whoever was first."""
        self.require_conditional_puts()
        while True:
            first, taken = self._first(valid)
            if first is not None:
                return first
            try:
                self.put(first_free(taken), canonical_json(Claim(made=made).model_dump()).encode())
            except Held:
                continue
            return made

    def _first(self, valid: Callable[[str], bool]) -> tuple[str | None, set[int]]:
        """What the first valid claim names, and all numbers up to it."""
        taken = set[int]()
        for listed in self.listed():
            if number := self.number(listed):
                made = self._made(number) if listed.size <= LARGEST_CLAIM else None
                if made is not None and valid(made):
                    return made, taken
                taken.add(number)
        return None, taken

    def _made(self, number: int) -> str | None:
        try:
            return Claim.model_validate_json(self.get(number) or b"").made
        except ValidationError:
            return None
