"""Generation of images: image i of seed s has the same bits whatever else is requested."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from diffusion.common.device import compute_deterministically, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import autocast
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import GaussianNoise, uniform
from diffusion.common.shapes import group_by_shape
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset, Rows
from diffusion.families.config import FamilyConfig, sampling_conflict
from diffusion.families.model import Conditioning, ConditioningBatch, Model, to_float, to_uint8
from diffusion.families.text_encoder import Encoding, prompt_length, stack_encodings
from diffusion.generation.config import UNCONDITIONAL, Conditions, check_conditions
from diffusion.process.editing import Edit, downsample_mask, slerp
from diffusion.process.samplers import Noise, SamplingConfig

Encodings = Mapping[str | None, Encoding]
"""Encoding of each prompt, and of none: see ``Model.encode_prompt``."""


def sample(
    model: Model,
    indices: Sequence[int],
    seed: int,
    config: SamplingConfig,
    progress: Progress = ignore_progress,
    conditions: Conditions = UNCONDITIONAL,
    edit: Edit | None = None,
    at_once: int | None = None,
    noise: Callable[[range], Noise] | None = None,
    by_step: bool = False,
    encodings: Encodings | None = None,
) -> Tensor:
    """Generate the images ``indices`` of ``seed``, or edits of the image of ``edit``: (len(indices), C, H, W) uint8.

    All have the size of ``model`` (``Model.with_size``), whatever sizes ``conditions`` names: see ``sample_each``.

    Image i is always computed as member i mod B of the compute batch i div B (B = ``config.compute_batch``), because
    floating-point sums change with a batch's shape. ``at_once`` compute batches are computed concurrently on a CPU;
    None: one per core. ``noise`` of a compute batch is by default ``seed``'s. ``progress`` is in images, which
    moves when a compute batch ends, or with ``by_step`` in the sampler's steps for all compute batches. ``encodings``
    are the prompts', if they are made.

    Raises UserError for conditions that the model was not trained with, options that have no effect, and an edit of
    another shape than the model's.
    """
    _check_sample(model, config, conditions, edit)
    size = config.compute_batch
    batches = [range(b * size, (b + 1) * size) for b in sorted({index // size for index in indices})]
    generated_images: dict[int, Tensor] = {}
    device = resolve_device(config.device)
    model = model.to(device)

    # A GPU computes a batch in parallel by itself.
    with compute_deterministically(device), worker_threads(at_once if device.type == "cpu" else 1) as pool:
        # Inside, as the bits of encodings depend on the number of threads.
        encodings = encode_prompts(model, conditions) if encodings is None else encodings

        steps = StepProgress(progress if by_step else ignore_progress, len(batches))

        def generate(members: range) -> Tensor:
            source = noise(members) if noise else GaussianNoise(seed, "sampling", members, model.noise_shape)
            conditioning = make_conditioning(model, members, seed, conditions, encodings)
            conditioning = {name: value.to(device) for name, value in conditioning.items()}
            negative = {name: value.to(device) for name, value in encodings[conditions.negative_prompt].items()}
            report_steps = partial(steps.report, members.start)
            batch = ConditioningBatch(conditioning, lambda: source().to(device), negative, edit, report_steps)
            return model.sample(batch, config, device)

        for number, (members, images) in enumerate(zip(batches, pool.map(generate, batches), strict=True), start=1):
            generated_images |= zip(members, images, strict=True)
            if by_step:
                steps.finish(members.start)
            else:
                progress("images sampled", min(number * size, len(indices)), len(indices))
    return torch.stack([generated_images[index] for index in indices])


def _check_sample(model: Model, config: SamplingConfig, conditions: Conditions, edit: Edit | None) -> None:
    """Raise UserError as ``sample`` does."""
    if edit is not None and edit.image.shape != model.shape:
        actual, expected = ("×".join(map(str, shape)) for shape in (edit.image.shape, model.shape))
        raise UserError(
            f"the image has {actual} (channels × height × width) and the model generates {expected}: bring it there"
        )
    if model.config.low_resolution is not None:
        raise UserError(
            "the model enlarges images and generates nothing from noise alone (model.low_resolution): give it a small "
            "image to upscale"
        )
    check_sampling(model, config, conditions)
    if edit is not None:
        check_edit(model, edit)


class StepProgress:
    """Progress of a sampler in steps, over compute batches that are computed in several threads."""

    def __init__(self, progress: Progress, batches: int) -> None:
        self.progress, self.batches, self.steps = progress, batches, 1
        self.done: dict[int, int] = {}
        self.lock = threading.Lock()

    def report(self, batch: int, done: int, steps: int) -> None:
        """Report the steps of a compute batch; going back, as ``repaint`` does, counts nothing."""
        with self.lock:
            self.steps, self.done[batch] = steps, max(done, self.done.get(batch, 0))
            self.progress("steps", sum(self.done.values()), steps * self.batches)

    def finish(self, batch: int) -> None:
        """Report that a compute batch is done; a model without a sampler has one step."""
        self.report(batch, self.steps, self.steps)


def sample_each(
    model: Model,
    indices: Sequence[int],
    seed: int,
    config: SamplingConfig,
    progress: Progress = ignore_progress,
    conditions: Conditions = UNCONDITIONAL,
    at_once: int | None = None,
) -> list[Tensor]:
    """Generate images as ``sample`` does, each (C, H, W) uint8 of its size in ``conditions``.

    An image has the same bits as with others of its size only. A compute batch is computed once for each size
    in it, so images of equal sizes should have consecutive indices. Raises UserError for sizes that the model's
    network does not take, before anything is generated.
    """
    by_size = group_by_shape(conditions.size(index) or model.shape[1:] for index in indices)
    models = {size: model.with_size(size) for size in by_size}
    generated_images: dict[int, Tensor] = {}

    def report_progress(what: str, done: int, total: int | None, note: str = "") -> None:
        progress(what, offset + done, len(indices), note)

    for size, numbers in by_size.items():
        offset = len(generated_images)
        part = indices if len(models) == 1 else [indices[number] for number in numbers]
        images = sample(models[size], part, seed, config, report_progress, conditions, at_once=at_once)
        generated_images |= zip(numbers, images, strict=True)
    return [generated_images[number] for number in range(len(indices))]


def interpolate(
    model: Model,
    seed: int,
    to_seed: int,
    count: int,
    config: SamplingConfig,
    progress: Progress = ignore_progress,
    conditions: Conditions = UNCONDITIONAL,
    by_step: bool = False,
) -> Tensor:
    """Generate images from image 0 of ``seed`` to ``to_seed``'s, (count, C, H, W) uint8, as ``sample`` does."""
    check_interpolation(model, seed, to_seed, count, conditions)
    shares = torch.linspace(0, 1, count)

    def noise(members: range) -> Noise:
        # Members beyond the last image only fill the batch.
        places = shares[torch.tensor(members).clamp(max=count - 1)]
        ends = [GaussianNoise(end, "sampling", [0], model.noise_shape) for end in (seed, to_seed)]
        return lambda: slerp(ends[0]()[0], ends[1]()[0], places)

    return sample(model, range(count), seed, config, progress, conditions, noise=noise, by_step=by_step)


def check_sampling(model: Model, config: SamplingConfig, conditions: Conditions) -> None:
    """Raise UserError for ``conditions`` that ``model`` was not trained with, or options that have no effect."""
    check_sampling_options(model.config, config)
    check_conditions(model.classes, model.config.text, config, conditions)
    if config.autoguides and model.guide is None:
        is_partial = model.header.base is not None or model.header.student_steps is not None
        can_have_guide = not is_partial and model.config.can_have_guide
        raise UserError(
            f"sampling.autoguidance = {config.autoguidance:g} leads away from the guide of a model (training.guide), "
            f"and this one has none: {'train one that has one, or ' if can_have_guide else ''}leave it out (null)"
        )
    if model.config.embeds_guidance:
        if conditions.negative_prompt is not None:
            raise UserError(
                "the pipeline's network is shown sampling.guidance, and is not led away from anything: leave the "
                "negative prompt out"
            )
        if config.guidance_interval is not None or config.guidance_rescale is not None:
            raise UserError(
                "the pipeline's network is shown sampling.guidance, which has no interval and is not rescaled: leave "
                "sampling.guidance_interval and sampling.guidance_rescale out"
            )
    if not model.config.has_null_class:
        if config.guides:
            raise UserError(
                "the pipeline's network was trained on classes alone, and sampling.guidance leads away from an image "
                "of none: leave it out"
            )
        if None in conditions.labels:
            raise UserError("the pipeline's network was trained on classes alone: give every image a label, or none")


def check_sampling_options(model: FamilyConfig, config: SamplingConfig) -> None:
    """Raise UserError for a setting that has no effect for the family or the task of ``model``."""
    if problem := sampling_conflict(model, config):
        raise UserError(problem)
    if config.sampler == "scheduler" and "scheduler" not in model.abilities:
        raise UserError(
            "sampling.sampler = scheduler is that of an imported pipeline, and this is none: use another one"
        )
    if (noise := config.low_resolution_noise) is None:
        return
    if model.low_resolution is None:
        raise UserError(
            "sampling.low_resolution_noise is added to small images, and the model is given none "
            "(model.low_resolution): leave it out"
        )
    if noise > model.max_low_resolution_noise:
        raise UserError(
            f"sampling.low_resolution_noise = {noise:g} is more than the model was trained with, "
            f"{model.max_low_resolution_noise:g} (model.low_resolution_noise): lower it"
        )


def check_prompts(conditions: Conditions, prompt_length: Callable[[str], tuple[int, int, int]] = prompt_length) -> None:
    """Raise UserError for prompts that are empty or too long; captions of data sets may be either.

    ``prompt_length`` is the model's, or the one of Darkroom's own text encoder.
    """
    for text in conditions.texts:
        if text.encode(errors="ignore").decode() != text:
            raise UserError(f"the prompt {text[:40]!r} is no Unicode text: write it again")
        length, ends, limit = prompt_length(text) if text.strip() else (0, 0, 0)
        if length <= ends:
            raise UserError("a prompt needs words: write what the images are to show, or leave it out")
        if length > limit:
            raise UserError(f"the prompt {text[:40]!r}… has {length} word pieces, and {limit} are read: shorten it")


def check_edit(model: Model, edit: Edit) -> None:
    """Raise UserError if ``model`` cannot edit, or the mask keeps nothing at the model's resolution."""
    if "noise_levels" not in model.config.abilities:
        raise UserError(
            f"a model of the family {model.config.family} has no steps in which to edit an image: use a diffusion model"
        )
    _, height, width = model.noise_shape
    if edit.kept is not None and edit.strength == 1 and not downsample_mask(edit.kept, (height, width)).any():
        factor = len(edit.kept) // height
        raise UserError(
            f"the mask keeps no square of {factor}×{factor} pixels whole, which is what one position of the model's "
            "latents stands for, so nothing of the image would be seen: keep more, or give a strength below 1"
        )


def check_interpolation(model: Model, seed: int, to_seed: int, count: int, conditions: Conditions) -> None:
    """Raise UserError if there is no path of ``count`` images from ``seed`` to ``to_seed``."""
    if seed == to_seed or count < 2:
        raise UserError(f"{count} images from seed {seed} to seed {to_seed}: give two seeds, and ask for two or more")
    if model.classes and not conditions.prompts and not conditions.labels:
        raise UserError(
            "each end would be of a class of its own, and there is nothing between classes: give a label, "
            f"one of {', '.join(model.classes)}"
        )
    if max(len(conditions.labels), len(conditions.prompts)) > 1:
        raise UserError("several labels or prompts alternate, which is not a path from one image to another: give one")


def encode_prompts(model: Model, conditions: Conditions) -> Encodings:
    """Encode each prompt, and none; raises UserError if ``model`` was trained with another encoder."""
    negative = conditions.negative_prompt
    texts = (None, *sorted(set(conditions.texts)))
    return {text: model.encode_negative(text) if text == negative else model.encode_prompt(text) for text in texts}


def labels_of(model: Model, indices: Sequence[int], seed: int, conditions: Conditions = UNCONDITIONAL) -> Tensor | None:
    """Choose each image's index in ``model.classes``, one more for unconditional: (N,); None for a model without."""
    if not model.classes:
        return None
    if conditions.labels or conditions.prompts:
        names: list[str | None] = [*model.classes, None]
        return torch.tensor([names.index(conditions.label(index)) for index in indices])
    # As often as in the data set.
    counts = torch.tensor([model.header.class_histogram[label] for label in model.classes])
    return torch.searchsorted(counts.cumsum(0).double() / counts.sum(), uniform(seed, "label", indices), right=True)


def reconstruct_images(model: Model, images: Tensor, config: SamplingConfig) -> Tensor:
    """Reconstruct ``images``, (N, C, H, W) uint8, with the autoencoder of ``model``, in compute batches."""
    autoencoder, device = model.autoencoder, model.device
    assert autoencoder is not None

    @torch.inference_mode()
    def reconstruct(batch: Tensor) -> Tensor:
        # The last batch is padded with its last image, so that all have one shape.
        inputs = batch[torch.arange(config.compute_batch).clamp(max=len(batch) - 1)]
        with autocast(config.precision, device):
            return to_uint8(autoencoder.decode(autoencoder.encode(to_float(inputs).to(device))))[: len(batch)].cpu()

    with compute_deterministically(device), worker_threads(None if device.type == "cpu" else 1) as pool:
        return torch.cat(list(pool.map(reconstruct, torch.split(images, config.compute_batch))))


def label_names(
    model: Model, indices: Sequence[int], seed: int, conditions: Conditions = UNCONDITIONAL
) -> list[str | None]:
    """Name the class that conditions each image; None: unconditional."""
    labels = labels_of(model, indices, seed, conditions)
    names: list[str | None] = [*model.classes, None]
    return [None] * len(indices) if labels is None else [names[number] for number in labels.tolist()]


def describe_conditions(model: Model, indices: Sequence[int], seed: int, conditions: Conditions) -> list[str]:
    """Describe each image by its class and its prompt, as grids show it; "" without either."""
    labels = label_names(model, indices, seed, conditions)
    return [
        ", ".join(filter(None, (label, conditions.prompt(index)))) for index, label in zip(indices, labels, strict=True)
    ]


def make_conditioning(
    model: Model,
    indices: Sequence[int],
    seed: int,
    conditions: Conditions = UNCONDITIONAL,
    encodings: Encodings | None = None,
) -> Conditioning:
    """Make the network's conditioning for the images ``indices``; ``encodings`` are the prompts', if they are made."""
    conditioning = {}
    if (labels := labels_of(model, indices, seed, conditions)) is not None:
        conditioning["label"] = labels
    if model.config.text:
        encodings = encode_prompts(model, conditions) if encodings is None else encodings
        conditioning |= stack_encodings(encodings[conditions.prompt(index)] for index in indices)
    return conditioning


def conditions_of(dataset: Dataset, rows: Rows, classes: Sequence[str]) -> Conditions:
    """Make conditions of the captions of ``rows``, and of their labels as far as they are in ``classes``."""
    labels = tuple(label if label in classes else None for label in dataset.labels(rows)) if classes else ()
    return Conditions(labels=labels, prompts=tuple(dataset.captions(rows)))
