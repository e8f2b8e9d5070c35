"""Prompt retrieval: how often the caption that an image was generated for is ranked first.

    python benchmarks/retrieval.py --images emoji --minutes 30

Trains a network conditioned on captions, and generates one image for each of two lists of them: every eighth caption of
the training set, and those of the held-out images. A classifier trained on real images of neither list then ranks the
captions for each generated image, and for the real image of each. It is a ridge regression from EfficientNet-Lite0's
features to the captions' embeddings, by cosine. The aim is half of what real images reach.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from quality import darkroom, workspace_of
from torch import Tensor
from torch.nn.functional import normalize

from diffusion.checkpoints import load_model
from diffusion.common.image_grids import make_grid, save_png
from diffusion.data.dataset import Dataset
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.families.text_encoder import encoder
from diffusion.generation.config import Conditions
from diffusion.generation.generate import sample
from flows.config import load_params

FEATURES_AT = 128
RANKS = (1, 5, 10)
PENALTIES = tuple(10.0**power for power in range(-2, 5))
"""Of the ridge regression; that counts which serves best the tenth of the training images held out for it."""
CAPTION_STRIDE = 8
"""Of so many captions that the network is trained on, one is generated again, and withheld from the reader."""
SHOWN = (
    "red heart",
    "smiling cat face with open mouth",
    "pizza",
    "blue car",
    "snowman",
    "crying face",
    "yellow flower",
)
"""Prompts whose images are laid out to be looked at, a row each."""


@dataclass(frozen=True)
class Captioned:
    """Images and what they show."""

    rows: np.ndarray
    """Of the data set."""
    texts: list[str]

    def meanings(self) -> Tensor:
        """(N, 384), as the sentence encoder reads the captions."""
        return torch.stack([encoder()(text) for text in self.texts])


@dataclass(frozen=True)
class Reader:
    """From features of images to what a caption of them would mean."""

    mean: Tensor
    weights: Tensor

    @classmethod
    def fit(cls, features: Tensor, meanings: Tensor) -> "Reader":
        """Ridge regression of ``meanings`` (N, 384) on ``features`` (N, F), every tenth held out to choose it by."""
        validation = torch.arange(len(features)) % 10 == 0

        def top_10_share(penalty: float) -> float:
            reader = cls._fit(features[~validation], meanings[~validation], penalty)
            return float((reader.ranks(features[validation], meanings[validation]) < RANKS[-1]).float().mean())

        return cls._fit(features, meanings, max(PENALTIES, key=top_10_share))

    @classmethod
    def _fit(cls, features: Tensor, meanings: Tensor, penalty: float) -> "Reader":
        mean = features.mean(0)
        x = (features - mean).double()
        gram = x.T @ x / len(x) + penalty * 1e-2 * x.var() * torch.eye(x.shape[1], dtype=torch.float64)
        return cls(mean, torch.linalg.solve(gram, x.T @ (meanings - meanings.mean(0)).double() / len(x)).float())

    def ranks(self, features: Tensor, meanings: Tensor) -> Tensor:
        """How many of ``meanings`` are likelier than its own for each of the images with ``features``: (N,)."""
        predictions = normalize((features - self.mean) @ self.weights, dim=1)
        likeness = predictions @ normalize(meanings - meanings.mean(0), dim=1).T
        return (likeness > likeness.diagonal()[:, None]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a source with captions")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    parser.add_argument("--model", type=Path, help="a model trained on the same images, instead of training one")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    parser.add_argument("--image", type=Path, help="where to draw a row of images for some prompts (PNG)")
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, args.images, args.size)
    settings = ["model.text=true", f"sampling.guidance={args.guidance}", *args.set]
    path = args.model or train_model(workspace, [*settings, f"training.minutes={args.minutes}"])
    sampling = load_params(workspace / "params.yaml", settings).sampling
    model, dataset = load_model(path), Dataset.open(workspace / "data" / "images")

    train, held_out = (_captioned(dataset, split) for split in ("train", "held_out"))
    training_captions = Captioned(train.rows[::CAPTION_STRIDE], train.texts[::CAPTION_STRIDE])
    extractor = EfficientNetLite0(FEATURES_AT)

    def features(captioned: Captioned) -> Tensor:
        return extractor(dataset.images(captioned.rows))

    reader_rows = torch.arange(len(train.rows)) % CAPTION_STRIDE != 0
    reader = Reader.fit(features(train)[reader_rows], train.meanings()[reader_rows])
    for title, captioned in {"of the training set": training_captions, "that training never saw": held_out}.items():
        prompts = tuple(captioned.texts)
        generated_images = sample(model, range(len(prompts)), 0, sampling, conditions=Conditions(prompts=prompts))
        generated = extractor(generated_images)
        shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(prompts)))
        images = {
            "real images": features(captioned),
            "generated images": generated,
            "generated for another caption": generated[shuffled],
        }
        ranks = {name: reader.ranks(each, captioned.meanings()) for name, each in images.items()}
        print(table(f"{len(prompts)} captions {title}", ranks))
    if args.image:
        show(args.image, sample(model, range(8 * len(SHOWN)), 0, sampling, conditions=Conditions(prompts=SHOWN)))


def table(title: str, ranks_by_kind: dict[str, Tensor]) -> str:
    """How often the right caption is among the first, of the ranks of each kind of images, (N,)."""
    lines = [
        f"\n| {title}; the right one is among the first |" + "".join(f" {rank} |" for rank in RANKS) + " median rank |"
    ]
    lines.append("|---|" + "---:|" * (len(RANKS) + 1))
    for name, ranks in ranks_by_kind.items():
        shares = "".join(f" {(ranks < rank).float().mean():.0%} |" for rank in RANKS)
        lines.append(f"| {name} |{shares} {ranks.median() + 1} |")
    count = len(ranks)
    lines.append("| chance |" + "".join(f" {rank / count:.1%} |" for rank in RANKS) + f" {count // 2} |")
    return "\n".join(lines)


def train_model(workspace: Path, settings: list[str]) -> Path:
    """A model with these settings: trained, or found."""
    summary = darkroom(
        workspace, "train", "--local", "--restart-if-different", words=[*settings, "training.output=runs/captions"]
    )
    print(json.dumps(summary))
    return workspace / str(summary["final"])


def _captioned(dataset: Dataset, split: str) -> Captioned:
    """The rows of one split that have a caption, each caption once."""
    rows = dataset.rows(split)  # type: ignore[arg-type]
    first: dict[str, int] = {}
    for row, text in zip(rows.tolist(), dataset.captions(rows), strict=True):
        if text is not None:
            first.setdefault(text, row)
    return Captioned(np.array(list(first.values())), list(first))


def show(path: Path, images: Tensor) -> None:
    """Lay out ``images``, which show SHOWN in turns, a row for each of those."""
    order = torch.arange(len(images)).view(-1, len(SHOWN)).T.flatten()
    save_png(path, make_grid(images[order], columns=len(images) // len(SHOWN)))


if __name__ == "__main__":
    main()
