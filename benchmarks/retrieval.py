"""Whether pictures drawn for a caption show what it says: how often the caption is found by the picture.

    python benchmarks/retrieval.py --pictures emoji --minutes 30

Trains a network that is told captions, on part of the pictures, and draws one picture for each caption of the others.
A reader of pictures, trained on the same part and on real pictures alone, then says for each drawn picture which of all
those captions is likeliest, and the same for the real picture of each. The reader is a ridge regression from
EfficientNet-Lite0's features to the captions' embeddings, by cosine. The aim is half of what real pictures reach.
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

from diffusion.config_sampling import Asked
from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import EfficientNetLite0
from diffusion.grids import grid, save_png
from diffusion.model import load_model
from diffusion.sampling import sample
from diffusion.text import encoder
from flows.params import load_params

FEATURES_AT = 128
RANKS = (1, 5, 10)
PENALTIES = tuple(10.0**power for power in range(-2, 5))
"""Of the ridge regression; that counts which serves best the tenth of the training pictures kept back for it."""
SHOWN = (
    "red heart",
    "smiling cat face with open mouth",
    "pizza",
    "blue car",
    "snowman",
    "crying face",
    "yellow flower",
)
"""Prompts whose pictures are laid out to be looked at, a row each."""


@dataclass(frozen=True)
class Reader:
    """From features of pictures to what a caption of them would mean."""

    mean: Tensor
    weights: Tensor

    @classmethod
    def trained(cls, features: Tensor, meanings: Tensor) -> "Reader":
        """Ridge regression of ``meanings`` (N, 384) on ``features`` (N, F), every tenth kept back to choose it by."""
        back = torch.arange(len(features)) % 10 == 0

        def found(penalty: float) -> float:
            reader = cls._fitted(features[~back], meanings[~back], penalty)
            return float((reader.ranks(features[back], meanings[back]) < RANKS[-1]).float().mean())

        return cls._fitted(features, meanings, max(PENALTIES, key=found))

    @classmethod
    def _fitted(cls, features: Tensor, meanings: Tensor, penalty: float) -> "Reader":
        mean = features.mean(0)
        x = (features - mean).double()
        gram = x.T @ x / len(x) + penalty * 1e-2 * x.var() * torch.eye(x.shape[1], dtype=torch.float64)
        return cls(mean, torch.linalg.solve(gram, x.T @ (meanings - meanings.mean(0)).double() / len(x)).float())

    def ranks(self, features: Tensor, meanings: Tensor) -> Tensor:
        """How many of ``meanings`` are likelier than its own for each of the pictures with ``features``: (N,)."""
        said = normalize((features - self.mean) @ self.weights, dim=1)
        likeness = said @ normalize(meanings - meanings.mean(0), dim=1).T
        return (likeness > likeness.diagonal()[:, None]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="a source with captions")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    parser.add_argument("--model", type=Path, help="a model trained on the same pictures, instead of training one")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    parser.add_argument("--picture", type=Path, help="where to draw a row of pictures for some prompts (PNG)")
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, args.pictures, args.size)
    settings = ["model.text=true", f"sampling.guidance={args.guidance}", *args.set]
    path = args.model or trained(workspace, [*settings, f"training.minutes={args.minutes}"])
    sampling = load_params(workspace / "params.yaml", settings).sampling
    model, dataset = load_model(path), Dataset.open(workspace / "data" / "pictures")

    captioned = {split: _captioned(dataset, split) for split in ("train", "held_out")}
    meanings = {split: torch.stack([encoder()(text) for text in texts]) for split, (_, texts) in captioned.items()}
    extractor = EfficientNetLite0(FEATURES_AT)
    real = {split: extractor(dataset.pictures(rows)) for split, (rows, _) in captioned.items()}
    reader = Reader.trained(real["train"], meanings["train"])
    asked = tuple(captioned["held_out"][1])
    drawn = sample(model, range(len(asked)), 0, sampling, asked=Asked(prompts=asked))
    found = {
        "real pictures": reader.ranks(real["held_out"], meanings["held_out"]),
        "drawn pictures": reader.ranks(extractor(drawn), meanings["held_out"]),
    }
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(asked)))
    found["drawn for another caption"] = reader.ranks(extractor(drawn)[shuffled], meanings["held_out"])
    print(f"\n{len(asked)} captions that training never saw; how often the right one is among the first")
    print(f"| {'':26} |" + "".join(f" {rank:4} |" for rank in RANKS) + " median rank |\n|---|" + "---:|" * 4)
    for name, ranks in found.items():
        shares = "".join(f" {(ranks < rank).float().mean():4.0%} |" for rank in RANKS)
        print(f"| {name:26} |{shares} {ranks.median() + 1:5} |")
    chance = "".join(f" {rank / len(asked):4.0%} |" for rank in RANKS)
    print(f"| {'chance':26} |{chance} {len(asked) // 2:5} |")
    if args.picture:
        show(args.picture, sample(model, range(8 * len(SHOWN)), 0, sampling, asked=Asked(prompts=SHOWN)))


def trained(workspace: Path, settings: list[str]) -> Path:
    """A model with these settings: trained, or found."""
    done = darkroom(workspace, "stage", "train", words=[*settings, "training.output=runs/told"])
    print(json.dumps(done))
    return workspace / done["final"]


def _captioned(dataset: Dataset, split: str) -> tuple[np.ndarray, list[str]]:
    """The rows of one split that have a caption, each caption once, and the captions."""
    rows = dataset.rows(split)  # type: ignore[arg-type]
    first: dict[str, int] = {}
    for row, text in zip(rows.tolist(), dataset.captions(rows), strict=True):
        if text is not None:
            first.setdefault(text, row)
    return np.array(list(first.values())), list(first)


def show(path: Path, pictures: Tensor) -> None:
    """Lay out ``pictures``, which show SHOWN in turns, a row for each of those."""
    order = torch.arange(len(pictures)).view(-1, len(SHOWN)).T.flatten()
    save_png(path, grid(pictures[order], columns=len(pictures) // len(SHOWN)))


if __name__ == "__main__":
    main()
