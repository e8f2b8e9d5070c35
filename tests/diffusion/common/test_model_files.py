"""What is not a model file is refused in one line that says how to come to one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", r"is a folder: .*`darkroom model import .*/weights --out FILE.safetensors`"),
        ("unet.safetensors", "import a diffusers pipeline as a folder by `darkroom model import`"),
        ("gone.safetensors", "train one with `darkroom train`, or import one with `darkroom model import`"),
    ],
)
def test_other_files_say_how_to_come_to_a_model(name: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"conv_in.weight": torch.zeros(1)}, folder / "unet.safetensors")
    with pytest.raises(UserError, match=words):
        read_header(folder / name)
