"""Families side by side: evaluated on the same images, in order, each once, on a page of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.image_grids import make_grid, png_bytes
from diffusion.data.dataset import Dataset
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.ranking import RANKING, Ranking, rank_models
from diffusion.evaluation.reports.ranking_report import RANKING_PAGE, RankingPage, describe_ranking
from diffusion.families.config import AutoregressiveConfig, GANConfig, ModelConfig
from diffusion.process.samplers import SamplingConfig, sampling_config
from tests.builders.captioned import squares
from tests.builders.comparisons import CONFIG, SAMPLING, Watcher, save_images, write_autoencoder, write_of_family
from tests.builders.html_pages import Page
from tests.builders.shapes import disc
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import CONFIG as NETWORK
from tests.builders.small_models import write_model
from tests.builders.text_image_encoders import write_onnx

PLAIN = sampling_config(compute_batch=16, precision="fp32")
"""Of families without a reverse process."""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, tuple[Path, SamplingConfig]]:
    gan, pixels = GANConfig(width=8, channel_mult=(1,), latent=4), AutoregressiveConfig(width=8, layers=1, mixtures=1)
    return {
        "ddpm": (write_model(tmp_path / "ddpm.safetensors", 1, 100, training={"minutes": 2.0}), SAMPLING),
        "vae": (write_autoencoder(tmp_path / "vae.safetensors", 2), PLAIN),
        "gan": (write_of_family(tmp_path / "gan.safetensors", gan, 3), PLAIN),
        "autoregressive": (write_of_family(tmp_path / "autoregressive.safetensors", pixels, 4), PLAIN),
    }


def good(first: int, deviation: float) -> Tensor:
    """Discs under noise."""
    images = np.stack([np.asarray(disc(number, 8))[None] for number in range(first, first + 48)])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(first))
    return (torch.from_numpy(images) + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def compared(
    models: dict[str, tuple[Path, SamplingConfig]], data: Path, folder: Path, progress: Watcher | None = None
) -> tuple[Ranking, dict[str, Tensor]]:
    return rank_models(data, models, CONFIG, folder, progress or Watcher())


def test_families_are_ranked_by_distance_with_confidence_of_the_lead(
    data: Path, models: dict[str, tuple[Path, SamplingConfig]], tmp_path: Path
) -> None:
    images_by_family = {
        "gan": good(5000, 5),
        "autoregressive": good(6000, 5),
        "ddpm": good(7000, 40),
        "vae": good(8000, 90),
    }
    for name, images in images_by_family.items():
        save_images(models[name][0], images, data, tmp_path, sampling=models[name][1])
    ranking, sheets = compared(models, data, tmp_path)
    names = [each.name for each in ranking.models]
    assert set(names[:2]) == {"gan", "autoregressive"}
    assert names[2:] == ["ddpm", "vae"]
    assert [lead.is_sure for lead in ranking.leads] == [False, True, True]
    statements = describe_ranking(ranking)
    assert "not distinguishable from the best" in statements[0]
    assert statements[1].startswith(f"{names[0]} is better than ddpm: by ")
    extractor, dataset = make_extractor(CONFIG), Dataset.open(data)
    real = compute_moments(extractor(dataset.images(dataset.rows("held_out"))))
    for each in ranking.models:
        expected = frechet_distance(compute_moments(extractor(images_by_family[each.name])), real)
        assert each.scores.fd == pytest.approx(expected, rel=1e-3)
        interval = each.estimates["kid_efflite0"].interval
        assert interval.low < each.estimates["kid_efflite0"].value < interval.high
        assert each.images_per_second > 0
        network = load_model(Path(each.file)).network
        assert each.parameters == sum(parameter.numel() for parameter in network.parameters())
        assert torch.equal(sheets[each.name], images_by_family[each.name])
    by_name = {each.name: each for each in ranking.models}
    assert {name: each.likelihood for name, each in by_name.items()} == {
        "ddpm": "bound",
        "vae": "bound",
        "gan": None,
        "autoregressive": "exact",
    }
    assert (losses := {name: each.held_out_loss for name, each in by_name.items()})["gan"] is not None
    assert losses["gan"].bits_per_dim is None
    assert all(getattr(losses[name], "bits_per_dim", None) for name in ("ddpm", "vae", "autoregressive"))
    assert by_name["ddpm"].minutes == 2


def test_interrupted_ranking_resumes_and_reuses_samples(
    data: Path, models: dict[str, tuple[Path, SamplingConfig]], tmp_path: Path
) -> None:
    two = {name: models[name] for name in ("gan", "autoregressive")}
    with pytest.raises(KeyboardInterrupt):
        compared(two, data, tmp_path, Watcher("autoregressive: images sampled"))
    assert not (tmp_path / RANKING).exists()
    second = Watcher()
    first, _ = compared(two, data, tmp_path, second)
    # What is timed is sampled once, by each, after all that is evaluated.
    assert second.seen.count("gan: images sampled") == second.seen.count("autoregressive: images sampled") - 3
    third = Watcher()
    again, _ = compared(two, data, tmp_path, third)
    assert third.sampled_models == set()
    assert again == first
    assert json.loads((tmp_path / RANKING).read_text()) == json.loads(first.model_dump_json())


def test_ranking_report_shows_all_families_and_is_self_contained(
    data: Path, models: dict[str, tuple[Path, SamplingConfig]], tmp_path: Path
) -> None:
    ranking, sheets = compared(models, data, tmp_path)
    sheet_files = {name: png_bytes(make_grid(images, 8)) for name, images in sheets.items()}
    RankingPage(ranking, sheet_files, sheet_files.pop("real")).write(tmp_path / RANKING_PAGE)
    page = Page((tmp_path / RANKING_PAGE).read_text())
    assert all(address.startswith("data:") for address in page.addresses)
    for name in models:
        assert np.array_equal(page.image(f"Images of {name}"), np.asarray(make_grid(sheets[name], 8)))
    assert np.array_equal(page.image("Real held-out images"), np.asarray(make_grid(sheets["real"], 8)))
    for words in ("KID", "precision", "recall", "bits per dimension", "images per second", "parameters", "≤", "none"):
        assert words in page.text
    assert all(words in page.text for words in describe_ranking(ranking))


@pytest.mark.slow
@pytest.mark.usefixtures("fake_encoder")
def test_a_model_of_captions_leads_none_without(tmp_path: Path) -> None:
    squares(tmp_path / "data", 120)
    text = NETWORK.model_copy(update={"text": True})
    paths = {"captions": text, "none": NETWORK, "more captions": text}
    files = {
        name: (write_model(tmp_path / f"{seed}.safetensors", seed, seed, 3, config=config), SAMPLING)
        for seed, (name, config) in enumerate(paths.items())
    }
    write_onnx(tmp_path / "encoder", knows_colours=True)
    for others, config in (
        ("none", CONFIG),
        ("more captions", CONFIG.model_copy(update={"text_image_encoder": tmp_path / "encoder"})),
    ):
        two = {name: files[name] for name in ("captions", others)}
        ranking, sheets = rank_models(tmp_path / "data", two, config, tmp_path / others)
        assert ranking.comparable == bool(ranking.leads) == (others != "none")
        assert (
            any("better" in words or "not distinguishable" in words for words in describe_ranking(ranking))
            == ranking.comparable
        )
        files_of = {name: png_bytes(make_grid(images, 8)) for name, images in sheets.items()}
        RankingPage(ranking, files_of, files_of.pop("real")).write(tmp_path / RANKING_PAGE)
        page_text = Page((tmp_path / RANKING_PAGE).read_text()).text
        assert "text-image agreement" in page_text
        assert ("not measured" in page_text) == (others == "none")


def test_incomparable_models_are_an_error(
    data: Path, models: dict[str, tuple[Path, SamplingConfig]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="nothing to compare gan with"):
        compared({"gan": models["gan"]}, data, tmp_path)
    small = ModelConfig(width=16, channel_mult=(1,), attention=(), low_resolution=4, conditional=False)
    enlarger = write_model(tmp_path / "enlarger.safetensors", 5, 1, config=small)
    with pytest.raises(UserError, match="enlarges from 4 pixels, and what it would be compared with"):
        compared(models | {"ddpm": (enlarger, SAMPLING)}, data, tmp_path)
    write_dataset(tmp_path / "other", random_images(60, size=12), per_shard=60)
    with pytest.raises(UserError, match=r"generates images of 1×8×8 and .*other holds 1×12×12"):
        compared(models, tmp_path / "other", tmp_path)
