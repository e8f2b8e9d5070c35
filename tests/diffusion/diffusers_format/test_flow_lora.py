"""Low-rank matrices for today's pipelines: plain diffusers generates with an export what Darkroom does."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.diffusers_format.adapter import export_adapter
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.diffusers_format.import_model import ImportParts, import_file
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.adapters.base import AdapterFormat
from diffusion.families.header import Origin
from diffusion.process.samplers import sampling_config
from tests.builders.adapters import write_adapter
from tests.builders.flow_pipelines import FLOW_MAKERS


def images(folder: Path, lora: Path | None = None) -> Tensor:
    """Images of diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    options = {"use_resolution_binning": False} if isinstance(pipe, diffusers.SanaPipeline) else {}
    result: Tensor = pipe(
        prompt="a red circle",
        height=32,
        width=64,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=3,
        output_type="pt",
        **options,
    ).images
    return result


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", [kind for kind in FLOW_MAKERS if kind != "pixart_sigma"])  # diffusers loads none
def test_diffusers_generates_the_images_of_the_merged_pipeline(
    tmp_path: Path, kind: str, file_format: AdapterFormat
) -> None:
    folder, base = FLOW_MAKERS[kind](tmp_path / "pipeline"), tmp_path / "base.safetensors"
    import_pipeline(folder, base, Origin(source="tiny", licence="openrail"))
    final = write_adapter(tmp_path / "final.safetensors", base, 0.25)
    export_to_diffusers(final, tmp_path / "merged", sampling_config(steps=2))
    expected, before = images(tmp_path / "merged"), images(folder)
    assert (expected - before).abs().max() > 0.01
    result = export_adapter(final, tmp_path / "out", file_format=file_format)
    file = next(tmp_path / "out" / name for name in result.files if name.endswith(".safetensors"))
    again = import_file(str(file), tmp_path / "again.safetensors", "openrail", tmp_path, parts=ImportParts(base=base))
    export_to_diffusers(again.file, tmp_path / "merged again", sampling_config(steps=2))
    torch.testing.assert_close(images(tmp_path / "merged again"), expected, atol=1e-4, rtol=0)
    if file_format == "diffusers" or kind == "stable_diffusion_xl":  # others have ComfyUI's names
        torch.testing.assert_close(images(folder, file), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_adapted_text_encoders_of_sdxl_are_read_by_diffusers(tmp_path: Path, file_format: AdapterFormat) -> None:
    folder, base = FLOW_MAKERS["stable_diffusion_xl"](tmp_path / "pipeline"), tmp_path / "base.safetensors"
    import_pipeline(folder, base, Origin(source="tiny", licence="openrail"))
    final = write_adapter(tmp_path / "final.safetensors", base, 0.25, rank=2, alpha=5, text_encoder=True)
    export_to_diffusers(final, tmp_path / "merged", sampling_config(steps=2))
    result = export_adapter(final, tmp_path / "out", file_format=file_format)
    file = next(tmp_path / "out" / name for name in result.files if name.endswith(".safetensors"))
    starts = {name.split(".")[0].split("_text_model")[0] for name in load_file(file)}
    if file_format == "kohya":
        assert {name for name in starts if not name.startswith("lora_unet_")} == {"lora_te1", "lora_te2"}
    else:
        assert starts == {"unet", "text_encoder", "text_encoder_2"}
    expected = images(tmp_path / "merged")
    assert (images(folder, file) - expected).abs().max() < 1e-5
    without = write_adapter(tmp_path / "without.safetensors", base, 0.25, rank=2, alpha=5)
    export_to_diffusers(without, tmp_path / "merged without", sampling_config(steps=2))
    assert (images(tmp_path / "merged without") - expected).abs().max() > 1e-3
