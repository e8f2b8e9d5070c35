"""Agreement of generated images with captions that list attributes, such as those of drawn faces.

    python benchmarks/caption_agreement.py --images faces --size 16 --images-seen 20480 --set model.text_tokens=0

Trains a network conditioned on captions for each seed, and generates an image for each held-out caption. Ridge
regressions from real images' pixels judge which phrases, between commas, an image shows: a generated one agrees as
often as it is judged to show exactly the phrase of its caption among those that exclude one another. Phrases do that if
they stand at the same place, or end in the same word ("red hair", "brown hair").
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from quality import darkroom, workspace_of
from torch import Tensor
from torch.nn.functional import one_hot

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.generation.config import Conditions
from diffusion.generation.generate import sample
from flows.config import load_params

PENALTY = 3.0
"""Of the ridge regressions, on pixels from 0 to 1."""
MAX_PHRASES = 16
"""Of an attribute: those with more are not judged."""


def attributes(caption: str) -> dict[str, str]:
    """Phrases of a caption by the last word of each."""
    phrases = [phrase.strip() for phrase in caption.split(",")]
    return {phrase.split()[-1]: phrase for phrase in phrases if phrase}


@dataclass(frozen=True)
class Judge:
    """Judges attributes of images by their pixels."""

    mean: Tensor
    weights: dict[str, tuple[list[str], Tensor]]
    """For each attribute its phrases, and a weight for each of them, (values + 1, phrases)."""

    @classmethod
    def fit(cls, images: Tensor, captions: Sequence[str]) -> "Judge":
        """Fit ridge regressions on real ``images`` (N, C, H, W)."""
        described = [attributes(caption) for caption in captions]
        counts = Counter(name for each in described for name in each)
        pixels = images.flatten(1).double() / 255
        x = _with_ones(pixels - pixels.mean(0))
        solve = torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1], dtype=torch.float64), x.T)
        weights = {}
        for name in sorted(counts):
            phrases = sorted({each.get(name, "") for each in described})
            if 1 < len(phrases) <= MAX_PHRASES:
                targets = torch.tensor([phrases.index(each.get(name, "")) for each in described])
                weights[name] = phrases, solve @ one_hot(targets, len(phrases)).double()
        return cls(pixels.mean(0), weights)

    def agreement(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Compute the share of ``images`` that show the phrase of their caption, by attribute."""
        x = _with_ones(images.flatten(1).double() / 255 - self.mean)
        return {
            name: mean(
                phrases[number] == attributes(caption).get(name, "")
                for number, caption in zip((x @ weights).argmax(1).tolist(), captions, strict=True)
            )
            for name, (phrases, weights) in self.weights.items()
        }


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a source with captions")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images-seen", type=int, default=60_000, help="in training")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, args.images, args.size)
    dataset = Dataset.open(workspace / "data" / "images")
    train, held_out = dataset.rows("train"), dataset.rows("held_out")[: args.samples]
    judge = Judge.fit(dataset.images(train), [text or "" for text in dataset.captions(train)])
    captions = [text or "" for text in dataset.captions(held_out)]
    print(table("real images", judge.agreement(dataset.images(held_out), captions)))
    for seed in range(args.seeds):
        settings = ["model.text=true", "model.conditional=false", f"training.images={args.images_seen}"]
        settings += [f"training.seed={seed}", "training.minutes=null", f"training.output=runs/agreement-{seed}"]
        summary = darkroom(workspace, "train", "--local", "--restart-if-different", words=[*settings, *args.set])
        model = load_model(workspace / str(summary["final"]))
        for guidance in args.guidance:
            words = [*settings, f"sampling.guidance={guidance}", *args.set]
            options = load_params(workspace / "params.yaml", words).sampling
            prompts = Conditions(prompts=tuple(captions))
            images = sample(model, range(len(captions)), 0, options, conditions=prompts)
            print(table(f"seed {seed}, guidance {guidance:g}", judge.agreement(images, captions)), flush=True)


def table(title: str, agreement: dict[str, float]) -> str:
    """A row: the mean of all attributes, and each."""
    return f"| {title} | {mean(agreement.values()):.3f} | " + ", ".join(f"{k} {v:.2f}" for k, v in agreement.items())


if __name__ == "__main__":
    main()
