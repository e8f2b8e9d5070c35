"""What --over means: every combination, each in folders of its own, and nothing that would not compare."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion.common.errors import UserError
from flows.cli.retraining_commands import configuration_options
from flows.config import Params, combinations, parse_over
from flows.sweep import sweep
from flows.tracking.console import CONSOLE, Lines

PARAMS = Params.model_validate({"training": {"dataset": "faces", "images": 100}, "model": {"width": 16}})


def test_every_sweep_combination_has_its_own_folders() -> None:
    over = parse_over(["training.learning_rate=1e-3,4e-3", "model.channel_mult=[1,2],[1, 2, 2]"])
    all_runs = combinations(PARAMS, over)
    settings = [(each.params.training.learning_rate, each.params.model.channel_mult) for each in all_runs]
    assert settings == [(0.001, (1, 2)), (0.001, (1, 2, 2)), (0.004, (1, 2)), (0.004, (1, 2, 2))]
    assert all((each.params.model.width, each.params.training.images) == (16, 100) for each in all_runs)
    assert len({each.params.run_folder for each in all_runs}) == len({each.folder for each in all_runs}) == 4
    assert all(each.params.run_folder.is_relative_to("runs/sweeps/faces") for each in all_runs)
    assert all(each.folder.is_relative_to("reports/faces/sweeps") for each in all_runs)
    assert all_runs[0].params.sampling == PARAMS.sampling


def test_sweep_folder_depends_on_init_from() -> None:
    over = parse_over(["model.width=32,64"])
    other = PARAMS.model_copy(update={"training": PARAMS.training.model_copy(update={"images": 200})})
    folders = [{each.params.run_folder for each in combinations(params, over)} for params in (PARAMS, other, PARAMS)]
    assert folders[0] == folders[2]
    assert not folders[0] & folders[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["model.width"], "write it as key=value,value"),
        (["model.width="], "write it as key=value,value"),
        (["model.width=[1"], "write it as key=value,value"),
        (["model.width=1", "model.width=2"], "given twice"),
        ([], "nothing to vary"),
        (["ingest.size=8,16"], "the same for all"),
        (["training.dataset=a,b"], "the same for all"),
        (["model.widht=8,16"], "did you mean width"),
        (["model.width=32,32"], "the same value twice"),
        (["training.learning_rate=1e-3,0.001"], "the same value twice"),
        (["training.images.x=1,2"], "images is a value, not a section"),
        (["training.guide=0.25,0.5"], "set sampling.autoguidance"),
    ],
)
def test_invalid_sweep_is_a_one_line_error(words: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error) as error_info:
        combinations(PARAMS, parse_over(words))
    assert "\n" not in str(error_info.value)


def test_options_of_a_sweep_are_those_of_all_its_trainings() -> None:
    settings = ["training.images=100", "model.width=16"]
    options = configuration_options(Path("faces.yaml"), settings, parse_over(["model.width=16,32"]))
    assert options == ["--params", "faces.yaml", "--set", "training.images=100"]
    assert configuration_options(Path("params.yaml"), [], {}) == []


def test_progress_of_a_sweep_names_the_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    lines = Lines(said.append)
    monkeypatch.setattr("flows.tracking.console.EVERY", 0.0)

    def train(params: Params, restart: str) -> SimpleNamespace:
        lines("images trained on", 50, 100)
        return SimpleNamespace(run_id=str(params.model.width))  # type: ignore[union-attr]

    def rank(*arguments: Any) -> Sequence[str]:
        options: Sequence[str] = arguments[-1]
        return options

    for name, function in (("train", train), ("evaluate", lambda *_: None), ("begin", lambda *_: "0"), ("rank", rank)):
        monkeypatch.setattr(f"flows.sweep.{name}", function)
    monkeypatch.setattr("flows.sweep.MlflowClient", lambda: SimpleNamespace(set_tag=lambda *_: None))
    token = CONSOLE.set(lines)
    try:
        options: Any = sweep.fn(PARAMS, {"model.width": [16, 32]}, ["--set", "training.images=100"])
    finally:
        CONSOLE.reset(token)
    assert options == ["--set", "training.images=100"]
    assert said == [
        "width=16: images trained on: 50 of 100",
        "width=16   done in 0:00",
        "width=32: images trained on: 50 of 100",
        "width=32   done in 0:00",
    ]
