"""Pictures from a trained model, the same bits for picture i of seed s whatever else is asked for."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.device import repeatable, resolve_device
from diffusion.editing import Edit, between, whole
from diffusion.errors import UserError
from diffusion.families import family_of
from diffusion.families.base import Batch
from diffusion.fingerprint import autocast
from diffusion.lanes import lanes
from diffusion.model import Conditioning, Model, to_float, to_uint8
from diffusion.models.config import FamilyConfig, ModelConfig, meaningless
from diffusion.progress import Progress, silent
from diffusion.random import GaussianNoise, uniform
from diffusion.samplers import Noise
from diffusion.text import ENDS, LONGEST, WIDTH, encoder, require_same

Meanings = Mapping[str | None, Tensor]
"""The embedding of each prompt, (384,), and zeros for None."""
NO_MEANINGS: Meanings = {None: torch.zeros(WIDTH)}


def sample(
    model: Model,
    indices: Sequence[int],
    seed: int,
    config: SamplingConfig,
    progress: Progress = silent,
    asked: Asked = ANYTHING,
    edit: Edit | None = None,
    at_once: int | None = None,
) -> Tensor:
    """Draw the pictures number ``indices`` of ``seed``, which show what is ``asked``: (len(indices), C, H, W) uint8.

    With an ``edit`` they are versions of its picture, which must have the model's shape.

    Picture i is always computed as member i mod B of the compute batch i div B (B = ``config.compute_batch``),
    with its neighbours beside it, because floating-point sums change with a batch's shape. So asking for
    whole multiples of B, starting at one, costs nothing extra. ``at_once``: how many of these are computed at the same
    time on a processor, which changes no bits; None: one on each core.

    Raises UserError if something is asked that the model was not told of, or that would have no effect.
    """
    if edit is not None and edit.picture.shape != model.shape:
        theirs, ours = ("×".join(map(str, shape)) for shape in (edit.picture.shape, model.shape))
        raise UserError(
            f"the picture has {theirs} (channels × height × width) and the model draws {ours}: bring it there"
        )

    def noise(members: range) -> Noise:
        return GaussianNoise(seed, "sampling", members, model.noise_shape)

    return _drawn(model, indices, seed, config, progress, asked, noise, edit, at_once)


def interpolate(
    model: Model,
    one: int,
    other: int,
    count: int,
    config: SamplingConfig,
    progress: Progress = silent,
    asked: Asked = ANYTHING,
) -> Tensor:
    """``count`` pictures from picture 0 of seed ``one`` to that of seed ``other``: (count, C, H, W) uint8.

    All their noise, fresh noise on the way included, lies between that of the two, so that what samplers add changes
    slowly as well. Raises UserError if there is no way between, and as ``sample`` does.
    """
    require_between(model, one, other, count, asked)
    shares = torch.linspace(0, 1, count)

    def noise(members: range) -> Noise:
        # Those beyond the last are there to fill the batch.
        places = shares[torch.tensor(members).clamp(max=count - 1)]
        ends = [GaussianNoise(seed, "sampling", [0], model.noise_shape) for seed in (one, other)]
        return lambda: between(ends[0]()[0], ends[1]()[0], places)

    return _drawn(model, range(count), one, config, progress, asked, noise)


def _drawn(
    model: Model,
    indices: Sequence[int],
    seed: int,
    config: SamplingConfig,
    progress: Progress,
    asked: Asked,
    noise: Callable[[range], Noise],
    edit: Edit | None = None,
    at_once: int | None = None,
) -> Tensor:
    require_drawing(model, config, asked)
    if edit is not None:
        require_editing(model, edit)
    family, size = family_of(model.config), config.compute_batch
    batches = [range(b * size, (b + 1) * size) for b in sorted({index // size for index in indices})]
    drawn: dict[int, Tensor] = {}
    device = resolve_device(config.device)
    model = model.on(device)

    # A GPU shares its work out by itself.
    with repeatable(device), lanes(at_once if device.type == "cpu" else 1) as pool:
        # In here as well: what a prompt means has bits that change with the threads that read it.
        meanings = meanings_of(model, asked)

        def draw(members: range) -> Tensor:
            fresh = noise(members)
            told = {name: value.to(device) for name, value in told_of(model, members, seed, asked, meanings).items()}
            negative = meanings[asked.negative_prompt].to(device)
            return family.sample(model, Batch(told, lambda: fresh().to(device), negative, edit), config, device)

        finished = pool.map(draw, batches)
        for number, (members, pictures) in enumerate(zip(batches, finished, strict=True), start=1):
            drawn |= zip(members, pictures, strict=True)
            progress("pictures sampled", min(number * size, len(indices)), len(indices))
    return torch.stack([drawn[index] for index in indices])


def require_drawing(model: Model, config: SamplingConfig, asked: Asked = ANYTHING) -> None:
    """Raise UserError if ``model`` draws nothing of itself, or would pass over some of ``config`` or ``asked``."""
    if model.config.low_resolution is not None:
        low, full = (f"{size}×{size}" for size in (model.config.low_resolution, model.header.size))
        raise UserError(
            f"the model enlarges pictures of {low} pixels or more, those of {low} to {full}, and draws nothing without "
            "one: give it a small picture to upscale"
        )
    require_meaning(model.config, config)
    require_small(model.config, config)
    require_effect(model.classes, model.config.text, config, asked)


def require_editing(model: Model, edit: Edit) -> None:
    """Raise UserError if ``model`` has no steps to edit in, or would see nothing of the picture that is edited."""
    if not family_of(model.config).edits:
        raise UserError(
            f"a model of the family {model.config.family} has no steps in which to edit a picture: use a diffusion "
            "model"
        )
    inner = model.noise_shape[-1]
    if edit.kept is not None and edit.strength == 1 and not whole(edit.kept, inner).any():
        factor = len(edit.kept) // inner
        raise UserError(
            f"the mask keeps no square of {factor}×{factor} pixels whole, which is what one position of the model's "
            "latents stands for, so nothing of the picture would be seen: keep more, or give a strength below 1"
        )


def require_between(model: Model, one: int, other: int, count: int, asked: Asked) -> None:
    """Raise UserError if there is no way of ``count`` pictures from seed ``one`` to seed ``other``."""
    if one == other or count < 2:
        raise UserError(f"{count} pictures from seed {one} to seed {other}: give two seeds, and ask for two or more")
    if model.classes and not asked.prompts and not asked.labels:
        raise UserError(
            "each end would be of a class of its own, and there is nothing between classes: give a label, "
            f"one of {', '.join(model.classes)}"
        )
    if max(len(asked.labels), len(asked.prompts)) > 1:
        raise UserError("several labels or prompts take turns, which is no way from one picture to another: give one")


def meanings_of(model: Model, asked: Asked) -> Meanings:
    """What the prompts mean to ``model``; raises UserError if the encoder that it was told by cannot be had."""
    prompts = {text for text in (*asked.prompts, asked.negative_prompt) if text is not None}
    if not prompts:
        return NO_MEANINGS
    require_same(model.header.encoder)
    read = encoder()
    return {**NO_MEANINGS, **{text: read(text) for text in sorted(prompts)}}


def require_read_whole(asked: Asked) -> None:
    """Raise UserError for a prompt of which nothing, or not all, would be read; captions of data sets may be so."""
    for text in (*asked.prompts, asked.negative_prompt):
        if text is None:
            continue
        if text.encode(errors="ignore").decode() != text:
            raise UserError(f"the prompt {text[:40]!r} is no Unicode text: write it anew")
        length = len(encoder().tokens(text)) if text.strip() else 0
        if length <= ENDS:
            raise UserError("a prompt needs words: write what the pictures are to show, or leave it out")
        if length > LONGEST:
            raise UserError(f"the prompt {text[:40]!r}… has {length} word pieces, and {LONGEST} are read: shorten it")


def require_meaning(model: FamilyConfig, config: SamplingConfig) -> None:
    """Raise UserError for a setting that means nothing to the family of ``model``."""
    if words := meaningless(model, "sampling", config):
        raise UserError(words)


def require_effect(classes: Sequence[str], text: bool, config: SamplingConfig, asked: Asked) -> None:
    """Raise UserError if what is ``asked`` means nothing to a model of ``classes``, and of captions if ``text``."""
    labels = [label for label in asked.labels if label is not None]
    if labels and not classes:
        raise UserError("the model was told no classes (model.conditional): ask for no label")
    if unknown := sorted(set(labels) - set(classes)):
        raise UserError(f"the model knows no class {unknown[0]!r}; it knows {', '.join(classes)}")
    prompts = [prompt for prompt in (*asked.prompts, asked.negative_prompt) if prompt is not None]
    if prompts and not text:
        raise UserError("the model was told no captions: leave prompts out, or train one with model.text=true")
    if asked.negative_prompt is not None and not config.guides:
        raise UserError("a negative prompt is what sampling.guidance leads away from: set that, say to 3")
    if config.guides and not leads_anywhere(classes, asked):
        raise UserError(
            f"sampling.guidance = {config.guidance:g} leads to what pictures are asked to show, and nothing is asked: "
            + ("give a prompt, or " if text else "the model was told neither classes nor captions, ")
            + "leave it out (null)"
        )


def require_small(model: FamilyConfig, config: SamplingConfig) -> None:
    """Raise UserError if ``config`` asks for noise over small pictures that ``model`` was not trained to stand."""
    noise = config.low_resolution_noise
    if noise is None:
        return
    if not isinstance(model, ModelConfig) or model.low_resolution is None:
        raise UserError(
            "sampling.low_resolution_noise lies over small pictures, and the model is shown none "
            "(model.low_resolution): leave it out"
        )
    if noise > model.most_low_resolution_noise:
        raise UserError(
            f"sampling.low_resolution_noise = {noise:g} is more than the model was trained with, "
            f"{model.most_low_resolution_noise:g} (model.low_resolution_noise): lower it"
        )


def leads_anywhere(classes: Sequence[str], asked: Asked) -> bool:
    """Whether guidance has something to lead a model of ``classes`` to."""
    named = any(each is not None for each in (*asked.labels, *asked.prompts, asked.negative_prompt))
    return named or bool(classes and not asked.prompts and not asked.labels)


def labels_of(model: Model, indices: Sequence[int], seed: int, asked: Asked = ANYTHING) -> Tensor | None:
    """The class of each picture, its number in ``model.classes`` or one more for any: (N,).

    Without labels and prompts they are drawn as often as the data set has them. None for a model without classes.
    """
    if not model.classes:
        return None
    if asked.labels or asked.prompts:
        names: list[str | None] = [*model.classes, None]
        return torch.tensor([names.index(asked.label(index)) for index in indices])
    counts = torch.tensor([model.header.class_histogram[label] for label in model.classes])
    shares = counts.cumsum(0).double() / counts.sum()
    return torch.searchsorted(shares, uniform(seed, "label", indices), right=True)


def reconstructed(model: Model, pictures: Tensor, config: SamplingConfig) -> Tensor:
    """``pictures``, (N, C, H, W) uint8, as the autoencoder of ``model`` gives them back, in compute batches."""
    coder, device = model.coder, next(model.network.parameters()).device
    assert coder is not None

    @torch.inference_mode()
    def through(batch: Tensor) -> Tensor:
        # The last one filled up with its last picture, so that all have one shape.
        filled = batch[torch.arange(config.compute_batch).clamp(max=len(batch) - 1)]
        with autocast(config.precision, device):
            return to_uint8(coder.decode(coder.encode(to_float(filled).to(device))))[: len(batch)].cpu()

    with repeatable(device), lanes(None if device.type == "cpu" else 1) as pool:
        return torch.cat(list(pool.map(through, torch.split(pictures, config.compute_batch))))


def label_names(model: Model, indices: Sequence[int], seed: int, asked: Asked = ANYTHING) -> list[str | None]:
    """The name of the class that each picture was asked to show; None: of any."""
    labels = labels_of(model, indices, seed, asked)
    names: list[str | None] = [*model.classes, None]
    return [None] * len(indices) if labels is None else [names[number] for number in labels.tolist()]


def told_of(
    model: Model,
    indices: Sequence[int],
    seed: int,
    asked: Asked = ANYTHING,
    meanings: Meanings = NO_MEANINGS,
) -> Conditioning:
    """What the network is told of pictures number ``indices``."""
    told = {}
    if (labels := labels_of(model, indices, seed, asked)) is not None:
        told["label"] = labels
    if model.config.text:
        told["text"] = torch.stack([meanings[asked.prompt(index)] for index in indices])
    return told
