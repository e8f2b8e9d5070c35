"""The guides for users of other trainers do what they say, on a tiny Stable Diffusion and a few images."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from tests.builders import ROOT
from tests.builders.command_line import CommandLine
from tests.builders.ldm_checkpoint import write_checkpoint
from tests.builders.pipelines import stable_diffusion
from tests.builders.shapes import disc
from tests.docs.pages import blocks, of_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = ("training.checkpoints=1", "training.warmup_images=0", "training.cpu_threads=1", "sampling.steps=2")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, captions, and a pipeline as a folder and as one file."""
    monkeypatch.chdir(tmp_path)
    for folder in ("img/10_sks cat", "photos"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(8):
            bands = disc(number).resize((80, 80)), *[Image.new("L", (80, 80))] * 2
            Image.merge("RGB", bands).save(tmp_path / folder / f"{number}.png")
            (tmp_path / folder / f"{number}.txt").write_text("a red circle")
    stable_diffusion(tmp_path / "painter")
    stable_diffusion(tmp_path / "sd15")
    write_checkpoint(tmp_path / "sd15.safetensors", StableDiffusionPipeline.from_pretrained(tmp_path / "sd15"))
    return tmp_path


def follow(page: str, run: CommandLine, replaced: Mapping[str, str]) -> None:
    """Give the commands of a guide, with words ``replaced``, and trainings that are short."""
    for block in blocks(ROOT / "docs" / "how-to" / page, "sh"):
        follow_block(block, run, replaced)


def follow_block(block: str, run: CommandLine, replaced: Mapping[str, str]) -> None:
    """Give the commands of one block so."""
    for words in of_program("darkroom", block):
        command = shlex.join(words)
        for placeholder, actual in replaced.items():
            command = command.replace(placeholder, actual)
        settings = [word for each in SMALL for word in ("--set", each)] if words[0] == "train" else []
        run(*shlex.split(command), *settings)


def change_params(block: str, **smaller: Any) -> None:
    """Change ``params.yaml`` by the settings of a block, and fields of its training that are ``smaller``."""
    path, changes = Path("params.yaml"), yaml.safe_load(block)
    params = yaml.safe_load(path.read_text()) | {name: changes[name] for name in changes.keys() & {"model"}}
    for section in changes.keys() - {"model"}:
        params[section] |= changes[section]
    params["training"] |= smaller
    path.write_text(yaml.safe_dump(params))


def loads(folder: Path, base: Path) -> bool:
    """Whether diffusers adapts ``base`` by what lies in ``folder``."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.load_lora_weights(folder)
    return bool(pipeline.get_active_adapters())


@pytest.mark.long
def test_the_guide_to_fine_tuning_leads_from_captioned_images_to_a_lora(site: Path, command_line: CommandLine) -> None:
    page = ROOT / "docs" / "how-to" / "fine-tune.md"
    [look, train, export, *_], [settings, *options] = blocks(page, "sh"), blocks(page, "yaml")
    for number in range(8):
        disc(number).resize((80, 80)).save(site / "photos" / f"{number}.mask.png")
    follow_block(look, command_line, {})
    change_params(settings.replace("size: 512", "size: 16"), images=8)
    follow_block(train, command_line, {"hf://OWNER/stable-diffusion": "painter"})
    follow_block(export, command_line, {})
    with safe_open(str(site / "exports" / "cat" / "cat.safetensors"), "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks cat"
        assert any(name.startswith("lora_unet_") for name in file.keys())  # noqa: SIM118
    assert loads(site / "exports" / "cat", site / "painter")
    assert len([*(site / "look").glob("0*.png")]) == 4
    params = (site / "params.yaml").read_text()
    assert options
    for number, option in enumerate(options):
        (site / "params.yaml").write_text(params)
        change_params(option, output=f"runs/{number}")
        follow_block("darkroom ingest --local\ndarkroom train --local", command_line, {})
        assert (site / "runs" / f"{number}" / "final.safetensors").is_file()


def test_the_guide_from_other_trainers_ends_with_a_lora_in_their_format(site: Path, command_line: CommandLine) -> None:
    smaller = {"ingest.size=512": "ingest.size=16", "images=6400": "images=8"}
    follow("from-other-trainers.md", command_line, {"zwx.safetensors": "exports/cat/cat.safetensors"} | smaller)
    with safe_open(str(site / "exports" / "cat" / "cat.safetensors"), "pt") as file:
        assert file.metadata()["ss_network_dim"] == "16"
        assert file.metadata()["ss_network_alpha"].startswith("8")
        assert any(name.startswith("lora_unet_") for name in file.keys())  # noqa: SIM118
    assert loads(site / "exports" / "cat", site / "sd15")
    assert len([path for path in (site / "zwx").glob("0*.png") if Image.open(path).size == (16, 16)]) == 2


def test_the_guide_from_diffusers_ends_with_what_diffusers_loads(site: Path, command_line: CommandLine) -> None:
    small = "training.images=32 --set model.width=16"
    shorter = {"ingest.size=512": "ingest.size=16", "images=12800": "images=8", "training.minutes=60": small}
    follow("from-diffusers.md", command_line, shorter)
    assert loads(site / "exports" / "photos-lora", site / "painter")
    for name in ("painter", "small"):
        assert (site / "exports" / name / "model_index.json").is_file()
