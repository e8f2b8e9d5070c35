"""What a model's file says of itself is bounded, and compared with its tensors, before anything is built of it."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json
from diffusion.common.model_files import MAX_HEADER_BYTES, METADATA_KEY
from diffusion.families.config import AutoregressiveConfig, FamilyConfig, GANConfig, VAEConfig
from diffusion.families.vae.config import LatentSpace
from tests.builders.small_models import write_model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_model(tmp_path / "weights.safetensors", 1, 0)


def rewritten(path: Path, change: dict[str, Any]) -> Path:
    """The same tensors with ``change`` in the header; fields of the model as ``model.NAME``."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = json.loads(file.metadata()[METADATA_KEY])
    for name, value in change.items():
        section, _, field = name.partition("model.")
        (header["model_header"]["model"] if not section and field else header["model_header"])[field or name] = value
    other = path.with_name("other.safetensors")
    save_file(tensors, other, {METADATA_KEY: json.dumps(header)})
    return other


@pytest.mark.parametrize(
    "change",
    [
        {"model.width": 60_000},
        {"model.width": -16},
        {"model.blocks": 10**6},
        {"model.channel_mult": [1] * 1000},
        {"model.channel_mult": [10**6]},
        {"model.attention": [0] * 10**4},
        {"model.heads": 10**9},
        {"model.steps": 10**12},
        {"model.low_resolution": 10**9},
        {"size": 10**6},
        {"size": 0},
        {"channels": 1000},
        {"dataset": "../../x"},
        {"images": -1},
        {"sigma_data": 0},
        {"model": {"family": "vae", "blocks": 10**6}},
        {"model": {"family": "vae", "width": 10**6}},
        {"model": {"family": "gan", "blocks": 10**6}},
        {"model": {"family": "gan", "latent": 10**9}},
        {"model": {"family": "autoregressive", "width": 10**6}},
        {"model": {"family": "autoregressive", "layers": 10**6}},
        {"latents": {"autoencoder": {}, "digest": "0", "channels": 10**6, "size": 8}},
    ],
)
def test_out_of_range_model_header_is_a_one_line_error(weights: Path, change: dict[str, Any]) -> None:
    for read in (read_model_header, load_model):
        with pytest.raises(UserError, match="has a header this version cannot read") as error:
            read(rewritten(weights, change))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"model.width": 1024, "model.channel_mult": [4, 4]},
        {"model.blocks": 8},
        {"class_histogram": {str(number): 1 for number in range(10_000)}},
        {"model": VAEConfig(width=1024, channel_mult=(4, 4)).model_dump(mode="json")},
        {"model": GANConfig(width=1024, channel_mult=(4, 4)).model_dump(mode="json")},
        {"model": AutoregressiveConfig(width=4096).model_dump(mode="json")},
        {
            "latents": LatentSpace(
                autoencoder=VAEConfig(width=1024, channel_mult=(4, 4)), digest="0" * 64, channels=4, size=2
            ).model_dump(mode="json")
        },
    ],
)
def test_header_without_matching_tensors_allocates_no_memory(weights: Path, change: dict[str, Any]) -> None:
    load_model(weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="its tensors are not those that its header describes"):
        load_model(rewritten(weights, change))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 10**8, 2**63])
def test_a_header_of_a_hundred_megabytes_is_rejected_unread(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(min(size, 10**8) + 100)
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_model(path)


def test_deep_json_and_numbers_of_absurd_length_are_rejected(weights: Path) -> None:
    for text in ("[" * 10**5, '{"model_header": ' + "9" * 10**5 + "}", canonical_json({"model_header": "x" * 10**6})):
        save_file({"x": torch.zeros(1)}, weights, {METADATA_KEY: text})
        with pytest.raises(UserError) as error:
            load_model(weights)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "config", [VAEConfig(), GANConfig(width=8, channel_mult=(1, 1)), AutoregressiveConfig(width=8, layers=1)]
)
def test_families_are_described_without_memory_as_they_are_built(config: FamilyConfig) -> None:
    from diffusion.checkpoints import _SkipInitialization
    from diffusion.families import family_of

    with torch.device("meta"), _SkipInitialization():
        described = family_of(config).make_network(config, (1, 8, 8), 2)
    built = family_of(config).make_network(config, (1, 8, 8), 2)
    assert all(tensor.is_meta for tensor in described.state_dict().values())
    shapes = ({name: tensor.shape for name, tensor in each.state_dict().items()} for each in (described, built))
    assert next(shapes) == next(shapes)
