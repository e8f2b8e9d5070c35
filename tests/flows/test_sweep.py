"""What --over means: every combination, each in folders of its own, and nothing that would not compare."""

import pytest

from diffusion.common.errors import UserError
from flows.config import Params, combinations, parse_over

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
    ],
)
def test_invalid_sweep_is_a_one_line_error(words: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error) as error_info:
        combinations(PARAMS, parse_over(words))
    assert "\n" not in str(error_info.value)
