"""Short trainings, and trackers that stop them."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from diffusion.data.manifest import FileEntry
from diffusion.families.config import ModelConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.train import TrainResult, train

MODEL = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=1)

CONFIG = TrainingConfig(dataset="blobs", images=320, batch_size=16, warmup_images=32, checkpoints=4, keep=2, flip=True)

SAMPLING = sampling_config(steps=2, compute_batch=36)


class Stop(Exception):
    pass


class StopAt:
    """A tracker that ends the run when the given number of images is logged, as a kill between steps would."""

    def __init__(self, images: int) -> None:
        self.images = images

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        if images >= self.images:
            raise Stop

    def log_image(self, name: str, image: Image.Image, images: int) -> None:
        assert image.width > 0

    def sync(self) -> None:
        pass


def run(dataset: Path, output: Path, config: TrainingConfig = CONFIG, **options: object) -> TrainResult:
    return train(dataset, output, MODEL, config, SAMPLING, **options)  # type: ignore[arg-type]


class Away:
    """The shards of the data set in a folder, moved to another."""

    def __init__(self, folder: Path, elsewhere: Path) -> None:
        (folder / "shards").rename(elsewhere)
        self.elsewhere = elsewhere

    def fetch(self, entry: FileEntry, path: Path) -> None:
        path.write_bytes((self.elsewhere / Path(entry.name).name).read_bytes())
