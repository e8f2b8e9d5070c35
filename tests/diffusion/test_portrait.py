"""Portraits: what is said of a model's pictures, made once, and the same end after a kill."""

from pathlib import Path

import pytest
import torch

from diffusion.config_sampling import SamplingConfig
from diffusion.data.dataset import Dataset
from diffusion.evaluation.drift import appearance, drift
from diffusion.evaluation.duplicates import duplicates
from diffusion.evaluation.enlargement import psnr
from diffusion.evaluation.features import EfficientNetLite0, make_extractor
from diffusion.evaluation.held_out_loss import held_out_loss, measure
from diffusion.evaluation.metrics import judge
from diffusion.evaluation.portrait import Portrait, Portrayed, portray
from diffusion.evaluation.real import Real
from diffusion.evaluation.thumbnails import moved
from diffusion.model import load_model
from diffusion.sampling import sample
from diffusion.upscaling import shrunk, upscale
from tests.diffusion.small_models import CONFIG as MODEL
from tests.diffusion.small_models import write_model
from tests.diffusion.trials import (
    CONFIG,
    SAMPLING,
    Watcher,
    discs,
    let_draw,
    real,
    training_pictures,
    write_autoencoder,
)

CLASSES = {"left": 60, "right": 60}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discs(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.safetensors", seed=1, images=700)


def portrait_of(path: Path, data: Path, folder: Path, progress: Watcher | None = None, **changes: object) -> Portrayed:
    config, watcher = CONFIG.model_copy(update=changes), progress or Watcher()
    return portray(path, real(data, folder, config, watcher), config, SAMPLING, folder / "judged", watcher)


def test_a_portrait_says_of_the_drawn_pictures_what_each_measure_says(data: Path, model: Path, tmp_path: Path) -> None:
    found = portrait_of(model, data, tmp_path)
    drawn = sample(load_model(model), range(CONFIG.samples), CONFIG.seed, SAMPLING)
    assert torch.equal(found.pictures, drawn)
    dataset, extractor = Dataset.open(data), EfficientNetLite0(32)
    held_out = dataset.pictures(dataset.rows("held_out"))
    portrait = found.portrait
    expected = judge(extractor(drawn), extractor(held_out), "efflite0")
    assert portrait.scores.named() == pytest.approx(expected.named(), rel=1e-4, abs=1e-4)
    assert portrait.drift == drift(appearance(drawn), appearance(held_out))
    assert portrait.duplicates == duplicates(moved(drawn), moved(held_out))
    terms = measure(load_model(model), [(held_out, {})], SAMPLING)
    assert portrait.held_out_loss == held_out_loss(terms)
    assert (portrait.images, portrait.family, portrait.per_class, portrait.psnr) == (700, "ddpm", None, None)
    assert portrait.memorisation.drawn == CONFIG.samples
    assert portrait.gflop > 0
    assert Portrait.model_validate_json(portrait.model_dump_json()) == portrait
    names = portrait.named().keys()
    assert {"kid_efflite0", "copies_share", "duplicates_share", "drift_brightness", "bits_per_dim"} <= names


def test_scores_are_made_once(data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = portrait_of(model, data, tmp_path)
    monkeypatch.setattr("diffusion.evaluation.real.judge", None)
    assert portrait_of(model, data, tmp_path).portrait == first.portrait
    with pytest.raises(TypeError):
        portrait_of(model, data, tmp_path, samples=40)


def test_a_model_that_is_told_classes_is_judged_by_class(data: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "told.safetensors", 0, 1, classes=CLASSES)
    found = portrait_of(path, data, tmp_path, samples=64).portrait.per_class
    assert found is not None
    assert [each.name for each in found.classes] == ["left", "right"]
    assert sum(each.samples for each in found.classes) == 64
    assert [each.reference for each in found.classes] == [20, 20]


def test_copies_of_training_pictures_are_found_and_named(data: Path, model: Path, tmp_path: Path) -> None:
    let_draw(model, training_pictures(data, CONFIG.samples), data, tmp_path)
    found = portrait_of(model, data, tmp_path).portrait.memorisation
    assert found.share == 1
    assert found.p_value < 1e-3
    assert {(pair.drawn, pair.training) for pair in found.pairs} <= {(n, n) for n in range(CONFIG.samples)}


@pytest.mark.parametrize("flip", [False, True])
def test_mirrored_copies_count_where_training_mirrored(flip: bool, data: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "flipped.safetensors", 0, 1, training={"flip": flip})
    let_draw(path, training_pictures(data, CONFIG.samples).flip(3), data, tmp_path)
    share = portrait_of(path, data, tmp_path).portrait.memorisation.share
    assert share == 1 if flip else share < 0.9


def test_a_portrait_is_made_once_and_again_if_anything_changes(data: Path, model: Path, tmp_path: Path) -> None:
    first = portrait_of(model, data, tmp_path).portrait
    watcher = Watcher()
    assert portrait_of(model, data, tmp_path, watcher).portrait == first
    assert watcher.seen == []
    for change in ({"seed": 1}, {"samples": 32}):
        watcher = Watcher()
        assert portrait_of(model, data, tmp_path, watcher, **change).portrait != first
        assert watcher.drawn == {"model"}


def test_what_draws_from_nothing_is_not_drawn_again_because_the_data_set_grew(model: Path, tmp_path: Path) -> None:
    first = portrait_of(model, discs(tmp_path / "few", 80), tmp_path)
    watcher = Watcher()
    grown = portrait_of(model, discs(tmp_path / "more", 96), tmp_path, watcher)
    assert watcher.drawn == set()
    assert torch.equal(grown.pictures, first.pictures)
    assert grown.portrait.scores != first.portrait.scores
    kept = list((tmp_path / "judged" / "training").iterdir())
    assert [folder.name for folder in kept] == [Dataset.open(tmp_path / "more").manifest.content_digest[:16]]


@pytest.mark.parametrize(
    "stop_at", ["model: pictures sampled", "pictures compared with", "model: held-out pictures looked at"]
)
def test_a_portrait_that_was_cut_short_goes_on_to_the_same_end(
    stop_at: str, data: Path, model: Path, tmp_path: Path
) -> None:
    whole = portrait_of(model, data, tmp_path / "whole").portrait
    with pytest.raises(KeyboardInterrupt):
        portrait_of(model, data, tmp_path / "cut", Watcher(stop_at))
    watcher = Watcher()
    assert portrait_of(model, data, tmp_path / "cut", watcher).portrait == whole
    assert watcher.drawn == ({"model"} if stop_at.endswith("sampled") else set())


def test_an_autoencoder_is_judged_by_what_comes_back(data: Path, tmp_path: Path) -> None:
    path = write_autoencoder(tmp_path / "vae.safetensors", 0)
    sampling = SamplingConfig(compute_batch=16, precision="fp32")
    found = portray(path, real(data, tmp_path), CONFIG, sampling, tmp_path / "judged")
    assert found.psnr is not None
    assert len(found.psnr) == 40
    assert found.portrait.named()["reconstruction_psnr"] == pytest.approx(found.psnr.mean().item())
    assert found.portrait.held_out_loss.levels == []
    assert found.portrait.held_out_loss.bits_per_dim is not None


def test_a_model_that_enlarges_is_shown_one_half_of_the_held_out_pictures_and_compared_with_the_other(
    data: Path, tmp_path: Path
) -> None:
    config = MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    path = write_model(tmp_path / "sr.safetensors", 0, 1, config=config)
    dataset, extractor = Dataset.open(data), make_extractor(CONFIG)
    theirs = Real(dataset, extractor, CONFIG.reference, CONFIG.samples, tmp_path / "judged", 4)
    found = portray(path, theirs, CONFIG, SAMPLING, tmp_path / "judged")
    held_out = dataset.rows("held_out")
    shown = dataset.pictures(held_out[:20])
    assert torch.equal(found.pictures, upscale(load_model(path), shrunk(shown, 4), CONFIG.seed, SAMPLING))
    assert found.psnr is not None
    torch.testing.assert_close(found.psnr, psnr(found.pictures, shown))
    expected = judge(extractor(found.pictures), extractor(dataset.pictures(held_out[20:])), "x")
    assert found.portrait.scores.kid == pytest.approx(expected.kid, rel=1e-4)
