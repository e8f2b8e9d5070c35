"""Training on images that are not square: batches of one shape, and everything else as with squares."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.ingest import ingest
from diffusion.data.loader import Loader, make_order
from diffusion.data.manifest import read_manifest
from diffusion.families.config import ModelConfig, VAEConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.data import open_dataset
from diffusion.training.logging import Validation, read_metrics
from diffusion.training.preflight import make_preflight
from diffusion.training.train import train
from tests.builders.bucketed import bucketed_set
from tests.builders.bucketed import config as ingest_config
from tests.builders.small_trainers import make_trainer
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Away, Stop, StopAt, run

SHAPES = [(24, 12), (16, 16), (12, 24)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return bucketed_set(tmp_path)


@pytest.fixture
def training_set(data: Path) -> Iterator[Dataset]:
    with closing(Dataset.open(data)) as dataset:
        yield dataset


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("options", [{}, {"workers": 1, "prefetch": 1}, {"workers": 5, "prefetch": 7}])
def test_ranks_share_batches_of_one_shape_with_any_loader(
    training_set: Dataset, window: int | None, options: dict[str, int]
) -> None:
    rows, size = training_set.rows("train"), 8

    def batches(rank: int, ranks: int, **options: int) -> list[torch.Tensor]:
        order = make_order(training_set, 3, size, window)
        with Loader(training_set, rows, order, size, rank=rank, ranks=ranks, flip_seed=5, **options) as loader:
            return [loader.batch(at).images for at in range(0, 30 * size, size)]

    alone = batches(0, 1)
    assert {tuple(images.shape[2:]) for images in alone} == set(SHAPES)
    for ranks in (2, 4):
        shares = [batches(rank, ranks, **options) for rank in range(ranks)]
        assert all(torch.equal(torch.cat(each), images) for *each, images in zip(*shares, alone, strict=True))


SHORT = CONFIG.model_copy(update={"images": 160, "checkpoints": 2})


def test_stopped_run_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", SHORT)
    with pytest.raises(Stop):
        run(data, tmp_path / "cut", SHORT, track=lambda _: StopAt(112))
    resumed_run = run(data, tmp_path / "cut", SHORT.model_copy(update={"workers": 3, "prefetch": 5, "cache_bytes": 0}))
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    for name in ("losses.csv", "samples/0000000160.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all(
        math.isfinite(value) for row in read_metrics(tmp_path / "whole" / "losses.csv") for value in row.values()
    )
    header = load_model(whole.final).header
    counts = read_manifest(data).shape_counts["train"]
    assert header.shapes == dict(zip(SHAPES, counts, strict=True))
    with Image.open(tmp_path / "whole" / "samples" / "0000000160.png") as sheet:
        # Cells of 24 × 24 pixels, three times as large: half of them, or more, is white.
        assert sheet.size == (6 * 74 + 2, 6 * 74 + 2)
        assert 0.4 < (np.asarray(sheet.convert("RGB")) == 255).all(-1).mean() < 0.7


@pytest.mark.slow
def test_shards_are_streamed_in_windows_of_each_bucket(data: Path, tmp_path: Path) -> None:
    sizes = sorted((shard.bytes for shard in read_manifest(data).shards), reverse=True)
    windowed = SHORT.model_copy(update={"window": 1})
    whole = run(data, tmp_path / "whole", windowed)
    store = Away(data, tmp_path / "away")
    streamed = windowed.model_copy(update={"stream_bytes": sum(sizes), "cache_bytes": 0})
    assert run(data, tmp_path / "streamed", streamed, store=store).final.read_bytes() == whole.final.read_bytes()
    too_few = windowed.model_copy(update={"stream_bytes": sizes[0]})
    with pytest.raises(UserError, match="each bucket"), open_dataset(data, too_few, store):
        pass


def test_super_resolution_trains_on_buckets_that_its_scale_divides(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODEL.model_copy(update={"low_resolution": 8, "conditional": False})
    config = CONFIG.model_copy(update={"images": 64, "checkpoints": 1})

    def rarest(validation: Validation) -> Tensor:
        return min(validation.batches["train"], key=lambda batch: len(batch.rows)).images[:4]

    # As where most held-out images have another shape than most training images.
    monkeypatch.setattr(Validation, "images", property(rarest))
    final = train(data, tmp_path / "run", model, config, SAMPLING, lambda _: StopAt(10**9)).final
    assert load_model(final).header.sigma_data > 0
    with pytest.raises(UserError):
        train(data, tmp_path / "other", model.model_copy(update={"low_resolution": 2}), config, SAMPLING)


@pytest.mark.slow
def test_latents_have_the_shapes_of_the_buckets(data: Path, tmp_path: Path) -> None:
    square = tmp_path / "square"
    ingest(square, ingest_config(tmp_path / "pictures", fit="crop", size=16))
    autoencoder = VAEConfig(width=16, channel_mult=(1, 1), patch=1, latent_channels=2)
    short = CONFIG.model_copy(update={"images": 64, "checkpoints": 1})
    vae = train(square, tmp_path / "vae", autoencoder, short, sampling_config()).final
    model = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=1, autoencoder=str(vae))
    final = train(data, tmp_path / "run", model, short, SAMPLING).final
    assert load_model(final).with_size((12, 24)).noise_shape == (2, 6, 12)


def test_a_family_of_one_shape_is_rejected(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="square"):
        train(data, tmp_path / "run", VAEConfig(width=16), CONFIG, sampling_config())


def test_preflight_names_the_shapes(data: Path) -> None:
    with worker_threads(1) as pool:
        lines = dict(make_preflight(make_trainer(data, MODEL, CONFIG, pool), None).lines())
    assert "3 shapes of about 16×16×3, 12x24, 16x16, 24x12" in lines["images"]
