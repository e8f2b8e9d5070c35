"""Rules on the fields of configurations: which values have an effect, and which contradict each other."""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from diffusion.common.config import Config, OneOf
from diffusion.common.rules import find_conflict, given, names_without_effect, needs, only, unless


class Engine(Config):
    abilities: ClassVar[frozenset[str]] = frozenset({"steam"})
    family: str = "steam"
    gears: int | None = None


class Boiler(Config):
    pressure: Annotated[int, needs("fire")] = 1


class Drive(Config):
    fuel: Annotated[Literal["coal", "wood"], needs("steam")] = "coal"
    soot: Annotated[float | None, only("drive.fuel", "coal")] = None
    wheels: Annotated[int, needs("road"), unless("drive.rails")] = 4
    rails: Annotated[bool, given("model.gears", "rails need gears: set model.gears")] = False
    boiler: Boiler | None = None
    speed: Annotated[int | None, needs("steam"), needs("light", value=9, because="speed = 9 needs light")] = None


@pytest.mark.parametrize(
    ("engine", "drive", "words"),
    [
        ({}, {}, None),
        ({}, {"fuel": "wood"}, None),
        ({}, {"soot": 0.5}, None),
        ({}, {"fuel": "wood", "soot": 0.5}, "drive.soot means nothing to drive.fuel = wood: use coal, or leave it out"),
        ({}, {"wheels": 6}, "drive.wheels means nothing to model.family = steam: leave it out"),
        ({"gears": 3}, {"rails": True}, None),
        ({}, {"rails": True}, "rails need gears: set model.gears"),
        ({}, {"boiler": {"pressure": 1}}, None),
        ({}, {"boiler": {"pressure": 2}}, "drive.boiler.pressure means nothing to model.family = steam: leave it out"),
        ({}, {"speed": 8}, None),
        ({}, {"speed": 9}, "speed = 9 needs light"),
    ],
)
def test_first_broken_rule_is_described(engine: dict[str, object], drive: dict[str, object], words: str | None) -> None:
    assert find_conflict(model=Engine.model_validate(engine), drive=Drive.model_validate(drive)) == words


def test_rules_about_missing_sections_wait() -> None:
    assert find_conflict(drive=Drive(wheels=6, fuel="wood")) is None
    assert (
        find_conflict(drive=Drive(wheels=6, rails=True))
        == "drive.wheels means nothing to drive.rails = true: leave it out"
    )


def test_rule_can_wait_for_another_section() -> None:
    class Cart(Config):
        wheels: Annotated[int, replace(only("cart.road", "paved"), waits_for="model")] = 4
        road: str = "none"

    assert find_conflict(cart=Cart(wheels=6)) is None
    assert find_conflict(cart=Cart(wheels=6), model=Engine()) is not None


def test_fields_without_effect_do_not_depend_on_their_values() -> None:
    for drive in (Drive(), Drive(wheels=6)):
        assert names_without_effect("drive", ("model.abilities",), model=Engine(), drive=drive) == {"wheels"}
    assert names_without_effect("drive", ("drive.fuel",), model=Engine(), drive=Drive(fuel="wood")) == {"soot"}


class Circle(Config):
    shape: Literal["circle"] = "circle"
    radius: int = 1


class Square(Config):
    shape: Literal["square"] = "square"
    side: int = 2


SHAPE: TypeAdapter[Config] = TypeAdapter(Annotated[Config, OneOf("shape", (Circle, Square), default="circle")])


def test_kind_is_chosen_by_its_name() -> None:
    assert SHAPE.validate_python({}) == Circle()
    assert SHAPE.validate_python({"shape": "square", "side": 3}) == Square(side=3)
    assert SHAPE.validate_python(Square()) == Square()
    assert SHAPE.validate_json(SHAPE.dump_json(Square(side=5))) == Square(side=5)
    with pytest.raises(ValidationError, match=r"shape is circle \(default\) or square"):
        SHAPE.validate_python({"shape": "heptagon"})
    with pytest.raises(ValidationError) as error:
        SHAPE.validate_python({"shape": "square", "radius": 1})
    assert error.value.errors()[0]["loc"] == ("square", "radius")
