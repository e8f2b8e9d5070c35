"""Exported adapters of each kind and format generate in plain diffusers and peft what the merged pipeline does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.diffusers_format.adapter import DIFFUSERS_FILE, export_adapter
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.diffusers_format.import_model import ImportParts, import_file
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.adapters.base import AdapterFormat
from diffusion.families.header import Origin
from diffusion.process.samplers import sampling_config
from tests.builders import pipelines
from tests.builders.adapters import write_adapter

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2, "alpha": 5},
    "lora of several ranks": {"kind": "lora", "rank": 2, "alpha": 5, "ranks": {"attn2.*": 3, "unet.mid_block.*": 1}},
    "dora": {"kind": "dora", "rank": 2, "alpha": 5},
    "lokr": {"kind": "lokr", "rank": 1, "alpha": 3},
    "lokr of whole matrices": {"kind": "lokr", "rank": 8, "alpha": 6, "factor": 2},
    "oft": {"kind": "oft", "block_size": 4},
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder and model file of a tiny Stable Diffusion."""
    root = tmp_path_factory.mktemp("sd")
    folder, base = pipelines.MAKERS["stable_diffusion"](root / "pipeline"), root / "base.safetensors"
    import_pipeline(folder, base, Origin(source="tiny", licence="openrail"))
    return folder, base


def images(folder: Path, adapt: Callable[[Any], object] = lambda pipe: None) -> Tensor:
    """Images of diffusers alone, after ``adapt`` has changed its pipeline."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    adapt(pipe)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 3.0}
    result: Tensor = pipe("a red circle", generator=torch.Generator().manual_seed(3), **options).images
    return result


def load_peft_folders(folder: Path) -> Callable[[Any], None]:
    def adapt(pipe: Any) -> None:
        for component in sorted(path for path in folder.iterdir() if path.is_dir()):
            setattr(pipe, component.name, peft.PeftModel.from_pretrained(getattr(pipe, component.name), component))

    return adapt


def assert_equal_images(sd: tuple[Path, Path], final: Path, adapt: Callable[[Any], object], tmp_path: Path) -> None:
    export_to_diffusers(final, tmp_path / "merged", sampling_config(steps=2))
    expected, actual = images(tmp_path / "merged"), images(sd[0], adapt)
    assert (expected - images(sd[0])).abs().max() > 0.01
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_peft_generates_the_images_of_the_merged_pipeline(
    sd: tuple[Path, Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], text_encoder=True, **fields)
    result = export_adapter(final, tmp_path / "out", file_format="peft")
    parts = ("unet", "text_encoder")
    names = {f"{part}/{name}" for part in parts for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert result.files.keys() == names | {"README.md"}
    assert_equal_images(sd, final, load_peft_folders(tmp_path / "out"), tmp_path)
    assert export_adapter(final, tmp_path / "again", file_format="peft").files.items() >= {
        (name, digest) for name, digest in result.files.items() if name.endswith(".json")
    }


@pytest.mark.parametrize("kind", ["lora", "lora of several ranks", "dora"])
def test_diffusers_loads_lora_and_dora(sd: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], text_encoder=True, **KINDS[kind])
    export_adapter(final, tmp_path / "out", file_format="diffusers")
    assert_equal_images(sd, final, lambda pipe: pipe.load_lora_weights(tmp_path / "out"), tmp_path)


@pytest.mark.parametrize("fields", [KINDS["dora"], KINDS["dora"] | {"ranks": {"attn2.*": 3}}], ids=["one", "several"])
def test_dora_of_diffusers_is_imported(sd: tuple[Path, Path], tmp_path: Path, fields: dict[str, Any]) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], text_encoder=True, **fields)
    export_to_diffusers(final, tmp_path / "merged", sampling_config(steps=2))
    export_adapter(final, tmp_path / "out", file_format="diffusers")
    file, again = tmp_path / "out" / DIFFUSERS_FILE, tmp_path / "again.safetensors"
    result = import_file(str(file), again, "openrail", tmp_path, parts=ImportParts(base=sd[1]))
    assert (adapter := read_model_header(result.file).adapter) is not None
    assert adapter.kind == "dora"
    export_to_diffusers(result.file, tmp_path / "merged again", sampling_config(steps=2))
    expected = images(tmp_path / "merged")
    assert (expected - images(sd[0])).abs().max() > 0.01
    assert (images(tmp_path / "merged again") - expected).abs().max() < 1e-5


def test_kohya_file_has_the_alpha_of_each_layer(sd: tuple[Path, Path], tmp_path: Path) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], **KINDS["lora of several ranks"])
    export_adapter(final, tmp_path / "out", file_format="kohya")
    file = tmp_path / "out" / "out.safetensors"
    tensors = load_file(file)
    ranks = {len(value) for name, value in tensors.items() if name.endswith("lora_down.weight")}
    assert ranks == {1, 2, 3}
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {5.0}
    assert_equal_images(
        sd, final, lambda pipe: pipe.load_lora_weights(tmp_path / "out", weight_name=file.name), tmp_path
    )


@pytest.mark.parametrize("kind", ["lokr", "lokr of whole matrices"])
def test_diffusers_loads_lokr_into_the_denoiser(sd: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], **KINDS[kind])
    export_adapter(final, tmp_path / "out", file_format="diffusers")

    def adapt(pipe: Any) -> None:
        pipe.unet.load_lora_adapter(tmp_path / "out", weight_name=DIFFUSERS_FILE, prefix="unet")

    assert_equal_images(sd, final, adapt, tmp_path)


@pytest.mark.parametrize("kind", ["lokr", "lokr of whole matrices"])
def test_lokr_in_kohya_names_is_read_as_lycoris_reads_it(sd: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], **KINDS[kind])
    export_adapter(final, tmp_path / "out")
    with safe_open(tmp_path / "out" / "out.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"])["algo"] == "lokr"
    before, after = load_model(sd[1]).network.state_dict(), load_model(final).network.state_dict()
    layers = {f"lora_{name.removesuffix('.weight').replace('.', '_')}": name for name in before}
    for layer in sorted({name.partition(".")[0] for name in tensors}):
        parts = {name.partition(".")[2]: value.double() for name, value in tensors.items() if name.startswith(layer)}
        # By LyCORIS' LokrModule: α/r with r of the factors of W₂, and 1 if it is whole.
        second, scale = parts.get("lokr_w2"), 1.0
        if second is None:
            second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
            scale = float(parts["alpha"]) / len(parts["lokr_w2_b"])
        name = layers[layer]
        expected = before[name].double() + scale * torch.kron(parts["lokr_w1"], second).view(before[name].shape)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    ("kind", "file_format", "words"),
    [
        ("dora", "kohya", "diffusers or peft"),
        ("oft", "diffusers", "peft"),
        ("oft", "kohya", "peft"),
        ("lokr", "diffusers", "kohya or peft"),
    ],
)
def test_formats_that_others_would_misread_are_errors(
    sd: tuple[Path, Path], tmp_path: Path, kind: str, file_format: AdapterFormat, words: str
) -> None:
    final = write_adapter(tmp_path / "final.safetensors", sd[1], text_encoder=kind == "lokr", **KINDS[kind])
    with pytest.raises(UserError, match=f"exported as {words},.*--to diffusers"):
        export_adapter(final, tmp_path / "out", file_format=file_format)
    assert not (tmp_path / "out").exists()
