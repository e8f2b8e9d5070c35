"""The data set of a training: opened or streamed, with the captions and latents of its images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.common.config import DeviceName
from diffusion.common.device import device_name, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.progress import Progress
from diffusion.common.threads import cores
from diffusion.data.caption_embeddings import Captions, encode_texts, seconds_to_read
from diffusion.data.caption_texts import list_texts
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.encoding import NetworkWork
from diffusion.data.fan_out import FanOut, Workers, make_fan_out
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.latents import LatentCache
from diffusion.data.manifest import read_manifest
from diffusion.data.shards import ShardCache, ShardStore
from diffusion.families.model import Encoder, Model
from diffusion.families.text_encoder import CaptionEncoder, Encoding
from diffusion.families.vae.network import Latents
from diffusion.generation.generate import Encodings
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import Ranks

MEASURED = 1024
"""Maximum number of training images on which moments are measured: error about 0.1 %."""


@contextmanager
def open_dataset(data: Path, config: TrainingConfig, store: ShardStore | None) -> Iterator[Dataset]:
    """Open the data set in folder ``data``, or stream its shards from ``store``; UserError if it has no images."""
    shards = None
    if config.stream_bytes is not None:
        if store is None:
            raise UserError(
                "training.stream_bytes is set, and there is no remote to fetch shards from: "
                "leave it out (null) and get the data set with `dvc pull`"
            )
        manifest, window = read_manifest(data), config.window
        count = len(manifest.shards)

        def cached(window: int) -> int:
            """Count the bytes of two windows of each bucket, at most."""
            sizes = [
                sorted(
                    (part.shard.bytes for part in manifest.parts if part.shard and part.shape == shape), reverse=True
                )
                for shape in {part.shape for part in manifest.parts}
            ]
            return sum(sum(shard_sizes[: 2 * window]) for shard_sizes in sizes)

        if (required_bytes := cached(count if window is None else window)) > config.stream_bytes:
            max_window = next((size for size in range(count, 0, -1) if cached(size) <= config.stream_bytes), 0)
            hint = f", or set training.window to {max_window} or less" if max_window else ""
            subject = f"two windows of training.window = {window}" if window else f"all {count}"
            subject += " for each bucket" if window and manifest.storage.buckets else ""
            raise UserError(
                f"{subject} shards of data set {manifest.name} have up to {required_bytes} bytes and the cache holds "
                f"{config.stream_bytes}: raise training.stream_bytes to {required_bytes}{hint}"
            )
        shards = ShardCache(data.parent / ".shards", store, config.stream_bytes)
    with closing(Dataset.open(data, shards, config.cache_bytes)) as dataset:
        if not len(dataset.rows("train")):
            raise UserError(f"data set {data} has no training images: ingest more, or lower ingest.held_out")
        yield dataset


def fan_out_encodings(workers: Workers | None, device: DeviceName) -> FanOut:
    """Fan out on ``workers``, or threads, one per core: for None, for threads, and for processes that share a GPU."""
    gpus = int(resolve_device(device).type != "cpu")
    if workers is None or workers.runner == "threads" or (gpus and workers.runner == "processes"):
        return make_fan_out(IngestConfig(workers=cores()))
    # Made once there is something to encode: until then Ray may be missing.
    return lambda work, items: make_fan_out(workers, gpus=gpus)(work, items)


def seconds_to_encode(dataset: Dataset, captions: Captions | None) -> float:
    """Estimate the seconds of encoding the ``captions`` of ``dataset`` that are not in the cache, by threads."""
    return 0.0 if captions is None else seconds_to_read(dataset, captions.texts.texts, cores(), captions.encoding)


def encode_captions(
    dataset: Dataset,
    config: TrainingConfig,
    encoding: CaptionEncoder,
    ranks: Ranks,
    fan_out: FanOut | None,
    progress: Progress,
) -> Captions:
    """Encode the captions of ``dataset`` by ``encoding``, as far as they are not in the cache; UserError for none.

    The main process has the workers of ``fan_out`` encode them for all; None: all are as no caption.
    """
    captions, numbers = dataset.different_captions()
    if not captions:
        raise UserError(
            f"data set {dataset.folder} has no captions, and the network is conditioned on them (model.text, or the "
            "pipeline in training.init_from): ingest it with a NAME.txt beside each image, or a metadata.csv with "
            "columns file_name and text, or train another network"
        )
    texts = list_texts(captions, config.tags, config.seed)
    if fan_out is None:
        none = {name: value.expand(len(texts.texts), *value.shape) for name, value in encoding.none.items()}
        return Captions(none, np.arange(len(texts.texts)), numbers, encoding, texts)
    read = encode_texts(dataset, texts.texts, fan_out, progress, encoding) if ranks.is_main else ({}, None)
    captions_read = Captions(ranks.broadcast_tensors(read[0]), ranks.broadcast(read[1]), numbers, encoding, texts)
    if not encoding.measures_moments:
        return captions_read
    moments = captions_read.measure(dataset.rows("train"))
    return replace(captions_read, encoding=replace(encoding, moments=moments))


def encode_prior(config: TrainingConfig, captions: Captions | None, loads: bool) -> Encoding | None:
    """Encode the prompt of ``config.prior``, unless it ``loads`` an encoder as none; None: there is no prior.

    Raises UserError if an option is about captions, and the network has none.
    """
    if captions is None:
        for name in ("prior", "tags"):
            if getattr(config, name) is not None:
                raise UserError(f"training.{name} is about captions, and the network has none: leave it out")
    if captions is None or config.prior is None:
        return None
    if config.prior.prompt is None or not loads:
        return captions.encoding.none
    return captions.encoding.load_standardized()(config.prior.prompt)


def encode_grid(texts: Iterable[str], encoding: CaptionEncoder, loads: bool) -> Encodings:
    """Encode the ``texts`` of sample grids and none, unless it ``loads`` one all as none: steps need no encoder."""
    encode = encoding.load_standardized() if loads else lambda _: encoding.none
    return {None: encoding.none} | {text: encode(text) for text in texts}


def own_latents(
    autoencoder: Latents,
    initial: Model | None,
    dataset: Dataset,
    config: TrainingConfig,
    ranks: Ranks,
    fan_out: FanOut | None,
    progress: Progress,
) -> Callable[..., Tensor]:
    """Encode as ``encode_latents`` by an ``autoencoder`` that was trained here, and set its moments of latents.

    They are those of ``initial``, as its weights were trained with them, or those of the first training images by key.
    Without ``fan_out`` none are measured.
    """
    space = autoencoder.space
    encoded = encode_latents(autoencoder.network.to, space.digest, space.shape, dataset, config, fan_out, progress)
    if initial is not None:
        assert isinstance(initial.autoencoder, Latents)
        autoencoder.load_state_dict(initial.autoencoder.state_dict())
    elif fan_out is not None:
        parts = dataset.split_by_bucket(dataset.rows("train")[:MEASURED])
        means = torch.cat([encoded(part).double().transpose(0, 1).flatten(1) for part in parts], dim=1)
        std, mean = torch.std_mean(means, dim=1, correction=0)
        # A constant channel keeps its scale instead of being amplified.
        std = torch.where(std > 1e-4 * std.max(), std, 1.0)
        for name, moment in ranks.broadcast_tensors({"mean": mean.float(), "std": std.float()}).items():
            autoencoder.get_buffer(name).copy_(moment.view(1, -1, 1, 1))
    mean, std = autoencoder.mean.clone(), autoencoder.std.clone()  # which stay on the CPU
    return lambda *selection: (encoded(*selection) - mean) / std


def encode_latents(
    load: Callable[[torch.device], Encoder],
    digest: str,
    shape: tuple[int, int, int],
    dataset: Dataset,
    config: TrainingConfig,
    fan_out: FanOut | None,
    progress: Progress,
) -> Callable[..., Tensor]:
    """Encode the images of ``dataset`` by the autoencoder that ``load`` moves, as far as they are not in the cache.

    ``digest`` is the autoencoder's, ``shape`` (c, h, w) that of a square image's latents; without ``fan_out`` all are
    zeros. Returns the function that looks up the latents of rows of the data set.
    """
    if fan_out is None:
        return partial(_zero_latents, dataset, shape)
    encode = NetworkWork.here(partial(_load_encoder, load, config.device), config.device)
    key = digest_of([digest, device_name(resolve_device(config.device)), torch.__version__])
    return LatentCache(dataset, key, encode, config.flip, fan_out, progress).select_rows


def _load_encoder(load: Callable[[torch.device], Encoder], name: DeviceName) -> Callable[[Tensor], Tensor]:
    device = resolve_device(name)
    encoder = load(device)
    return lambda images: encoder.encode(images.to(device))


def _zero_latents(
    dataset: Dataset, shape: tuple[int, int, int], rows: Rows, mirrored: np.ndarray | None = None
) -> Tensor:
    """Return zeros in place of the latents of images in ``rows``, whose ``shape`` (c, h, w) is a square's."""
    sides = (
        side * latent // dataset.manifest.size
        for side, latent in zip(dataset.shapes[dataset.buckets(rows)[0]], shape[1:], strict=True)
    )
    return torch.zeros(len(rows), shape[0], *sides)
