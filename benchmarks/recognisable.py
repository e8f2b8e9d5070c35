"""Recognisability of a model's images, class by class, to a classifier trained on the real ones.

    python benchmarks/recognisable.py data/digits runs/digits/final.safetensors
    python benchmarks/recognisable.py … --guidance 2 --interval 0.2 5      # as the demo samples

Prints the share of samples that the classifier is at least 90 % sure of, and the share of each class.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.families.model import to_float
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config

CONFIDENCE = 0.9


def classifier(channels: int, size: int, classes: int) -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 32), *block(32, 32), nn.MaxPool2d(2),
        *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.4), nn.Linear(64 * (size // 4) ** 2, classes),
    )  # fmt: skip


def train_classifier(data: Dataset, epochs: int) -> nn.Sequential:
    torch.manual_seed(0)
    rows = data.rows("train")
    x, y = to_float(data.images(rows)), data.classes(rows, data.manifest.labels)
    network = classifier(*data.shape[:2], len(data.manifest.labels))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(rows) // 64))
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(64)[: len(rows) // 64]:  # type: ignore[no-untyped-call]
            loss = nn.functional.cross_entropy(network(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def verdict(network: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and class of each image."""
    probabilities = torch.cat([network(part).softmax(1) for part in to_float(images).split(100)])  # type: ignore[no-untyped-call]
    confidence, label = probabilities.max(1)
    return confidence, label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--interval", type=float, nargs=2)
    arguments = parser.parse_args()
    sampling = sampling_config(guidance=arguments.guidance, guidance_interval=arguments.interval)

    data = Dataset.open(arguments.dataset)
    labels = data.manifest.labels
    network = train_classifier(data, arguments.epochs)
    held_out = data.rows("held_out")
    real = data.images(held_out)
    model = load_model(arguments.model)
    generated = sample(model, range(arguments.count), arguments.seed, model.header.sampling(sampling))
    accuracy = (verdict(network, real)[1] == data.classes(held_out, labels)).float().mean().item()
    print(f"classifier: {accuracy:.1%} of {len(real)} held-out images right")
    for name, images in (("held-out images", real), ("samples", generated)):
        confidence, label = verdict(network, images)
        shares = torch.bincount(label, minlength=len(labels)) / len(label)
        sure = (confidence >= CONFIDENCE).float().mean().item()
        classes = ", ".join(f"{k} {share:.1%}" for k, share in zip(labels, shares.tolist(), strict=True))
        print(f"{name}: {sure:.1%} of {len(label)} with a confidence of at least {CONFIDENCE:g}; {classes}")


if __name__ == "__main__":
    main()
