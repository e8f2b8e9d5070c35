"""The models that come with the repository, as a user first tries them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.checkpoints import read_model_header
from flows.config import load_params
from tests.builders import ROOT
from tests.builders.command_line import darkroom
from tests.docs.pages import blocks, of_program

MODEL = ROOT / "examples" / "emoji.safetensors"
SIZES = {"emoji": 10e6, "things": 30e6}
"""Most bytes of a model."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_prompt_gives_an_image_of_its_colour_with_the_chosen_guidance(tmp_path: Path, name: str) -> None:
    model = ROOT / "examples" / f"{name}.safetensors"
    assert model.stat().st_size <= SIZES[name]
    header = read_model_header(model)
    assert header.model.text
    assert header.guidance is not None
    colours = {}
    for prompt in ("a red heart", "a blue heart"):
        out = tmp_path / prompt
        result = darkroom(
            tmp_path, "sample", "--model", str(model), "--prompt", prompt, "--count", "4", "--out", str(out)
        )
        assert result.returncode == 0, result.stderr
        images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))]).astype(float)
        colours[prompt] = images.reshape(-1, 3).mean(0)
    difference = colours["a red heart"] - colours["a blue heart"]
    assert difference[0] > 10
    assert difference[2] < -10


def test_the_guide_to_fine_tuning_configures_the_network_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}")
    scripts = blocks(ROOT / "docs" / "how-to" / "fine-tune.md", "sh")
    [words] = [
        words
        for script in scripts
        for words in of_program("darkroom", script)
        if "training.init_from=models:/emoji/1" in words
    ]
    settings = [value for option, value in pairwise(words) if option == "--set" and value.startswith("model.")]
    assert load_params(tmp_path / "params.yaml", settings).model == read_model_header(MODEL).model
