"""What is no model file is refused in one line that says how to come to one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header


def test_the_folder_of_a_pipeline_is_to_be_imported_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"is a folder: .*`darkroom model import {tmp_path} --out FILE.safetensors`"):
        read_header(tmp_path)


def test_weights_of_another_library_must_be_imported(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="import a diffusers pipeline as a folder by `darkroom model import`"):
        read_header(tmp_path / "unet.safetensors")


def test_a_missing_file_is_trained_or_imported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train one with `darkroom train`, or import one with `darkroom model import`"):
        read_header(tmp_path / "gone.safetensors")
