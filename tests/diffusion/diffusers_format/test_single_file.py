"""Single-file checkpoints: the pipeline that they were made from comes back, and nothing of them is run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.diffusers_format.import_model import ImportParts, import_file
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.header import Origin
from tests.builders import pipelines
from tests.builders.denoiser_checkpoint import DENOISERS, write_denoiser
from tests.builders.flow_pipelines import FLOW_MAKERS, stable_diffusion_xl
from tests.builders.ldm_checkpoint import write_checkpoint, write_checkpoint_xl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.stable_diffusion(tmp_path_factory.mktemp("made") / "pipeline")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    return write_checkpoint(folder.with_name("sd.safetensors"), pipe)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    """The pipeline without its weights."""
    return Path(shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))


def run(source: Path, config: Path | None, output: Path, licence: str | None = "openrail") -> Path:
    parts = ImportParts(pipeline_config=config)
    return import_file(str(source), output / "model.safetensors", licence, output, parts=parts).file


def test_checkpoint_has_the_weights_of_its_pipeline(
    folder: Path, checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    path, expected_path = run(checkpoint, config, tmp_path / "out"), tmp_path / "expected.safetensors"
    import_pipeline(folder, expected_path, Origin(source="tiny", licence="openrail"))
    actual, expected = load_model(path), load_model(expected_path)
    for name, value in expected.network.state_dict().items():
        assert torch.equal(actual.network.state_dict()[name], value), name
    assert torch.equal(actual.encode_prompt("a red circle")["states"], expected.encode_prompt("a red circle")["states"])
    assert actual.config == expected.config
    origin = read_model_header(path).origin
    assert origin is not None
    assert (origin.source, origin.revision) == ("sd.safetensors", f"sha256:{sha256_file(checkpoint)}")
    assert not [name for name in (tmp_path / "out").iterdir() if name != path]


def test_checkpoint_of_sdxl_has_the_weights_of_its_pipeline(tmp_path: Path) -> None:
    folder = stable_diffusion_xl(tmp_path / "xl")
    checkpoint = write_checkpoint_xl(
        tmp_path / "xl.safetensors", diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    )
    config = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    path, expected_path = run(checkpoint, Path(config), tmp_path / "out"), tmp_path / "expected.safetensors"
    import_pipeline(folder, expected_path, Origin(source="tiny", licence="openrail"))
    actual, expected = load_model(path), load_model(expected_path)
    for name, value in expected.network.state_dict().items():
        assert torch.equal(actual.network.state_dict()[name], value), name
    assert actual.config == expected.config


@pytest.mark.parametrize("kind", DENOISERS)
def test_file_of_a_denoiser_has_its_weights_and_the_folder_those_of_the_others(kind: str, tmp_path: Path) -> None:
    folder, others = FLOW_MAKERS[kind](tmp_path / "own"), FLOW_MAKERS[kind](tmp_path / "config")
    [place] = (folder / "transformer").glob("*.safetensors")
    changed = {name: value + 0.01 for name, value in load_file(place).items()}
    save_file(changed, place, {"format": "pt"})
    shutil.rmtree(others / "transformer")
    shutil.copytree(folder / "transformer", others / "transformer", ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = write_denoiser(tmp_path / "denoiser.safetensors", kind, changed)
    path, expected_path = run(checkpoint, others, tmp_path / "out"), tmp_path / "expected.safetensors"
    import_pipeline(folder, expected_path, Origin(source="tiny", licence="openrail"))
    actual, expected = load_model(path), load_model(expected_path)
    for name, value in expected.network.state_dict().items():
        assert torch.equal(actual.network.state_dict()[name], value), name
    assert actual.config.components["transformer"] == expected.config.components["transformer"]
    prompts = actual.encode_prompt("a red circle"), expected.encode_prompt("a red circle")
    assert all(torch.equal(prompts[0][name], value) for name, value in prompts[1].items())


def test_half_precision_stays_so(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    save_file({name: value.half() for name, value in load_file(checkpoint).items()}, tmp_path / "half.safetensors")
    tensors = load_file(run(tmp_path / "half.safetensors", config, tmp_path / "out"))
    assert tensors["ema.unet.conv_in.weight"].dtype == torch.float16


MISTAKES: dict[str, tuple[Callable[[Path, Path, Path], tuple[Path, Path | None]], str]] = {
    "without configuration": (lambda source, config, scratch: (source, None), "--config"),
    "a pickle": (lambda source, config, scratch: (Path(shutil.copy(source, scratch / "sd.ckpt")), config), "pickle"),
    "of nothing else": (lambda source, config, scratch: (write(scratch, {"a": torch.ones(2)}), config), "not hold"),
    "without its autoencoder": (
        lambda source, config, scratch: (
            write(scratch, {name: value for name, value in load_file(source).items() if "first_stage" not in name}),
            config,
        ),
        "not hold",
    ),
    "another network": (
        lambda source, config, scratch: (
            write(
                scratch,
                {name: value[:3] if "time_embed.0" in name else value for name, value in load_file(source).items()},
            ),
            config,
        ),
        "not hold",
    ),
    "not finite": (
        lambda source, config, scratch: (
            write(scratch, {name: value * torch.nan for name, value in load_file(source).items()}),
            config,
        ),
        "not finite",
    ),
    "code in the configuration": (
        lambda source, config, scratch: ((config / "unet" / "evil.py").write_text("1"), (source, config))[1],
        "is code",
    ),
    "a folder without index": (lambda source, config, scratch: (source, scratch), "model_index.json"),
}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize(("prepare", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    prepare: Callable[[Path, Path, Path], tuple[Path, Path | None]],
    words: str,
) -> None:
    source, own_config = prepare(checkpoint, config, tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        run(source, own_config, tmp_path / "out")
    assert "\n" not in str(raised.value)
