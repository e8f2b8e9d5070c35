"""Nouns that a model draws so that a design of emoji which it never saw has them: recognised images in percent.

    python benchmarks/emoji_judge.py emoji examples/emoji.safetensors   # emoji: by emoji_corpus.py

An image of a noun is recognised if one of the noun's emoji (emoji_prompts.json) is among the five of the held-out
design, of 1,900, that are nearest by the cosine of features. Features are the evaluator's, EfficientNet-Lite0's at 128
pixels, of images cut to what is on the white. They were made for photographs, and real emoji of other designs are not
always recognised either. The second column has features in which an emoji's designs are close: whitened by what tells
the training designs' images of one emoji apart (linear discriminant analysis); for real images of a design that is
measured on the others.
"""

import argparse
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import diffusion
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0

PROMPTS = Path(__file__).parent / "emoji_prompts.json"
FEATURES_AT = 128
NEAREST = 5
WHITE = 240
"""Least value of what counts as background, of 255."""
RIDGE = 1.0
"""Share of the mean variance added to each direction before whitening."""


@dataclass(frozen=True)
class Features:
    """Features of images, (N, D), and the name of the emoji or noun that each shows."""

    names: list[str]
    values: Tensor


def cut(image: np.ndarray, size: int = 64) -> np.ndarray:
    """Cut an ``image`` (H, W, 3) to a square around what is not white, of ``size`` pixels."""
    rows, columns = np.nonzero((image < WHITE).any(2))
    if not len(rows):
        return image
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(bottom - top, right - left)
    square = Image.new("RGB", (side, side), "white")
    part = Image.fromarray(image[top:bottom, left:right])
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


def extract(names: list[str], images: Iterable[np.ndarray]) -> Features:
    """Compute the features of ``images``, each (H, W, 3) uint8."""
    stack = torch.from_numpy(np.stack([cut(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    return Features(names, EfficientNetLite0(FEATURES_AT)(stack))


def read(folder: Path) -> Features:
    """Compute the features of the images in ``folder``."""
    paths = sorted(folder.glob("*.png"))
    return extract([path.stem for path in paths], (np.asarray(Image.open(path)) for path in paths))


@dataclass(frozen=True)
class Whitening:
    """Features in which the designs of an emoji are close to one another."""

    mean: Tensor
    factor: Tensor
    """Lower triangular, of the covariance within emoji."""

    @classmethod
    def fit(cls, designs: Iterable[Features]) -> "Whitening":
        """Fit to ``designs``, each centred, so that their styles count for nothing."""
        designs = list(designs)
        values = torch.cat([design.values - design.values.mean(0) for design in designs]).double()
        names = [name for design in designs for name in design.names]
        number = {name: index for index, name in enumerate(dict.fromkeys(names))}
        emoji = torch.tensor([number[name] for name in names])
        counts = torch.bincount(emoji).double()[:, None]
        means = torch.zeros(len(number), values.shape[1], dtype=torch.float64).index_add_(0, emoji, values) / counts
        within = values - means[emoji]
        covariance = within.T @ within / (len(values) - len(number))
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        return cls(torch.cat([design.values for design in designs]).mean(0), torch.linalg.cholesky(covariance + ridge))

    def __call__(self, features: Tensor, mean: Tensor | None = None) -> Tensor:
        """Whiten ``features`` (N, D), around ``mean``, or the mean of the designs that it was fitted to."""
        centred = (features - (self.mean if mean is None else mean)).double()
        white: Tensor = torch.linalg.solve_triangular(self.factor, centred.T, upper=False).T
        return white


def recognised(queries: Features, judge: Features, accepted: dict[str, list[str]]) -> Tensor:
    """Whether each of ``queries``, of nouns, has one of the ``accepted`` emoji among the nearest of ``judge``: (N,)."""
    likeness = normalize(queries.values, dim=1) @ normalize(judge.values, dim=1).T
    nearest = likeness.topk(NEAREST).indices.tolist()
    return torch.tensor(
        [
            any(judge.names[place] in accepted[noun] for place in places)
            for noun, places in zip(queries.names, nearest, strict=True)
        ]
    )


def shares(queries: Features, judge: Features, whitening: Whitening, accepted: dict[str, list[str]]) -> list[Tensor]:
    """Whether each of ``queries`` is recognised, by features as they are and whitened."""
    white_judge = Features(judge.names, whitening(judge.values, judge.values.mean(0)))
    white = Features(queries.names, whitening(queries.values))
    return [recognised(queries, judge, accepted), recognised(white, white_judge, accepted)]


def select_nouns(design: Features, accepted: dict[str, list[str]]) -> Features:
    """Select the first emoji of each noun that a ``design`` has."""
    place = {name: number for number, name in enumerate(design.names)}
    found = {
        noun: next(place[name] for name in names if name in place)
        for noun, names in accepted.items()
        if any(name in place for name in names)
    }
    return Features(list(found), design.values[list(found.values())])


def generate(path: Path, nouns: list[str], count: int, guidance: float | None) -> Features:
    """Compute the features of ``count`` images of each of ``nouns``, in turns."""
    model, number = diffusion.load(str(path)), len(nouns) * count
    if guidance is None:
        images = model.generate(nouns, count=number)
    else:
        images = model.generate(nouns, count=number, guidance=guidance)
    return extract(nouns * count, map(np.asarray, images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--count", type=int, default=4, help="images of each noun")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None], help="instead of the file's")
    args = parser.parse_args()
    accepted: dict[str, list[str]] = json.loads(PROMPTS.read_text())["nouns"]
    judge = read(args.corpus / "judge")
    designs = {folder.name: read(folder) for folder in sorted((args.corpus / "training").iterdir())}

    def row(title: str, results: list[Tensor]) -> None:
        print(f"| {title} | " + " | ".join(f"{result.float().mean():.1%}" for result in results) + " |", flush=True)

    print(f"\n| {len(accepted)} nouns among {len(judge.names):,} emoji | features | whitened |\n|---|---:|---:|")
    every: list[list[Tensor]] = []
    for name, design in designs.items():
        others = Whitening.fit(other for other in designs.values() if other is not design)
        every.append(shares(select_nouns(design, accepted), judge, others, accepted))
        row(f"real images: {name}", every[-1])
    row("real images: all six", [torch.cat(column) for column in zip(*every, strict=True)])
    chance = torch.tensor([len(names) * NEAREST / len(judge.names) for names in accepted.values()])
    row("chance", [chance, chance])
    whitening = Whitening.fit(designs.values())
    for path, guidance in itertools.product(args.models, args.guidance):
        queries = generate(path, list(accepted), args.count, guidance)
        results = shares(queries, judge, whitening, accepted)
        row(f"{path}, {args.count} images each" + ("" if guidance is None else f", guidance {guidance:g}"), results)
        counts = zip(accepted, results[0].view(args.count, -1).sum(0).tolist(), strict=True)
        print("never recognised:", ", ".join(noun for noun, count in counts if not count))


if __name__ == "__main__":
    main()
