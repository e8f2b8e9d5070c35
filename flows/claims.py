"""The first of several to make a thing: what it made is noted once on S3, where the others find it and use it.

``s3://BUCKET/claims/MODEL/KEY/00000001.json`` holds a name that a server gave, as a run's ID. MLflow finds runs by
their tags and lets any number of them have the same one; to create an object with If-None-Match is a write that one of
several succeeds with. A claim counts while what it names is there and valid: after that the next number is free.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from diffusion.config import Config
from diffusion.errors import Held
from diffusion.files import canonical_json
from flows.environment import settings
from flows.s3 import Location, Store
from flows.s3_errors import Missing

NAME = re.compile(r"[0-9]{8}\.json")
LARGEST = 4096
"""Bytes of a claim, at most; a larger object is none."""


class Claim(Config):
    """What somebody made."""

    made: str


@dataclass(frozen=True)
class Claims:
    """All claims to make one thing."""

    place: Location
    store: Store

    @classmethod
    def of(cls, model: str, key: str) -> "Claims":
        """Those to make what ``key`` identifies for a registered model."""
        return cls(Location(settings().bucket) / "claims" / model / key, Store())

    def holder(self, valid: Callable[[str], bool]) -> str | None:
        """What the first claim names that is ``valid``; None if none does."""
        return next((made for _, made in self._all() if made is not None and valid(made)), None)

    def claim(self, made: str, valid: Callable[[str], bool]) -> str:
        """Claim to have ``made`` the thing; returns what was made by whoever was first."""
        self.store.require_conditional_puts(self.place.bucket, "claims")
        while True:
            taken = set()
            for number, each in self._all():
                if each is not None and valid(each):
                    return each
                taken.add(number)
            number = next(number for number in range(1, len(taken) + 2) if number not in taken)
            key = self.place.key(f"{number:08d}.json")
            try:
                self.store.put_once(self.place.bucket, key, canonical_json(Claim(made=made).model_dump()).encode())
            except Held:
                continue
            return made

    def _all(self) -> Iterator[tuple[int, str | None]]:
        """Number of each claim and what it names; None: it is no claim."""
        prefix = self.place.key("")
        for listed in self.store.list_objects(self.place.bucket, prefix):
            if NAME.fullmatch(name := listed.key.removeprefix(prefix)):
                yield int(name[:8]), self._made(listed.key) if listed.size <= LARGEST else None

    def _made(self, key: str) -> str | None:
        try:
            return Claim.model_validate_json(self.store.get(self.place.bucket, key)).made
        except (Missing, ValidationError):
            return None
