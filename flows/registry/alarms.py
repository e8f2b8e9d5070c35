"""Drift alarms on S3: why ``monitor`` requested retrainings, and the limits on how often it may.

``s3://BUCKET/alarms/MODEL/00000001.json`` and so on are written once. Creating an alarm is the commit: of several
monitors one succeeds, and the limits hold whatever becomes of Prefect's database. The mark ``announced/00000001.json``
says that the alarm's event was emitted; ``answered/00000001.json`` names the flow run that retrains for it.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import canonical_json
from diffusion.data.manifest import Sha256
from flows.config import MonitorConfig
from flows.environment import settings
from flows.storage.numbered_objects import NumberedObjects, first_free, object_name
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError

MAX_ALARM_BYTES = 2**14  # larger objects are not alarms

Cause = Literal["quality", "images", "class_shares", "images_by_class"]
"""quality: the champion is surely worse than at its promotion; others: the test by which new images surely differ from
those it learned (``diffusion.evaluation.drift``)."""


class Alarm(Config):
    """A request of ``monitor`` to retrain."""

    format_version: Literal[2] = 2
    model: str
    key: Sha256
    """Digest of the champion's weights, the data set's content and the settings that were compared."""
    when: AwareDatetime
    who: str
    version: str
    """Champion, models:/NAME/NUMBER."""
    dataset: str
    content_digest: Sha256
    causes: tuple[Cause, ...]
    reason: str = Field(max_length=1000)


class NumberedAlarm(Alarm):
    """An alarm with its number."""

    number: int = Field(ge=1)

    def __str__(self) -> str:
        return f"alarm {self.number} of {self.when:%Y-%m-%d %H:%M} UTC: {self.reason}"


class RetrainingHold(Config):
    """Why no retraining is requested although there is a reason."""

    limit: Literal["cooldown", "week"]
    words: str


@dataclass(frozen=True)
class Alarms(NumberedObjects):
    """Alarms of one registered model."""

    @classmethod
    def of(cls, model: str) -> "Alarms":
        """Alarms of ``model`` in the bucket of the environment."""
        return cls(Location(settings().bucket) / "alarms" / model, Store())

    def read(self, number: int) -> NumberedAlarm:
        """Read one alarm; raises UserError if there is none of that number."""
        data = self.get(number, max_bytes=MAX_ALARM_BYTES) or b""
        try:
            return NumberedAlarm(number=number, **Alarm.model_validate_json(data).model_dump())
        except ValidationError as error:
            raise UserError(
                f"{self.place}/{object_name(number)} is not an alarm: leave the parameter alarm out"
            ) from error

    def all(self, numbers: Collection[int] | None = None) -> list[NumberedAlarm]:
        """Read all alarms, or the ones with these ``numbers``, in order; foreign objects are ignored."""
        alarms = []
        for number in sorted(self.numbers() if numbers is None else numbers):
            with suppress(UserError):
                alarms.append(self.read(number))
        return alarms

    def request(self, alarm: Alarm, limits: MonitorConfig) -> NumberedAlarm | RetrainingHold:
        """Raise ``alarm`` unless there is one of its key, which is returned, or ``limits`` do not allow another one."""
        self.require_conditional_puts()
        while True:
            # Listed once: two monitors that saw the same alarms compete for the same number.
            alarms = self.all(numbers := self.numbers())
            if duplicates := [entry for entry in alarms if entry.key == alarm.key]:
                return duplicates[0]
            if (limit_hold := check_alarm_limits(alarms, limits, alarm.when)) is not None:
                return limit_hold
            with suppress(ConflictError):
                self.put(number := first_free(numbers), canonical_json(alarm.model_dump(mode="json")).encode())
                return self.read(number)

    def is_announced(self, alarm: NumberedAlarm) -> bool:
        """Whether the event of the alarm was emitted."""
        return self.store.exists(self.place.bucket, self.place.key(f"announced/{object_name(alarm.number)}"))

    def mark_announced(self, alarm: NumberedAlarm) -> None:
        """Record that the event of the alarm was emitted."""
        self._put(f"announced/{object_name(alarm.number)}", b"")

    def answer(self, alarm: NumberedAlarm, run_id: str) -> str:
        """Record that the flow run ``run_id`` retrains for the alarm; returns the ID of the first one that did."""
        name = f"answered/{object_name(alarm.number)}"
        with suppress(ConflictError):
            self._put(name, run_id.encode())
        try:
            return self.store.get(self.place.bucket, self.place.key(name), max_bytes=MAX_ALARM_BYTES).decode(
                errors="replace"
            )
        except MissingObjectError:
            return run_id

    def _put(self, name: str, data: bytes) -> None:
        self.store.put_once(self.place.bucket, self.place.key(name), data, content_type="application/json")


def check_alarm_limits(alarms: Sequence[NumberedAlarm], limits: MonitorConfig, now: datetime) -> RetrainingHold | None:
    """Return why ``limits`` forbid another alarm at ``now``, after ``alarms``; None if they do not."""
    week = [alarm for alarm in alarms if now - alarm.when < timedelta(days=7)]
    if len(week) >= limits.retrainings_per_week:
        numbers = ", ".join(str(alarm.number) for alarm in week)
        message = (
            f"monitor.retrainings_per_week = {limits.retrainings_per_week} is used up (alarms {numbers}): see why "
            "retraining does not help, or run `darkroom retrain`"
        )
        return RetrainingHold(limit="week", words=message)
    last_alarm = max(alarms, key=lambda alarm: alarm.when, default=None)
    cooldown = timedelta(hours=limits.cooldown_hours)
    if last_alarm is not None and now - last_alarm.when < cooldown:
        end = last_alarm.when + cooldown
        message = f"alarm {last_alarm.number} requested one already: not again before {end:%Y-%m-%d %H:%M} UTC"
        return RetrainingHold(limit="cooldown", words=message)
    return None
