"""Parts of ``gpu.py`` that measure speed and memory: training of several networks, and beside diffusers' script."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_bench import Bench, FailedCheckError, Measurement, Result, Sizes
from humanize import naturalsize
from step import measure_matrix_products, rate, synchronize
from torch import Tensor
from trainers import diffusers as diffusers_recipe

from diffusion.common.device import compute_deterministically
from diffusion.common.fingerprint import autocast
from diffusion.families.config import DiffusersConfig, FamilyConfig
from diffusion.training.trainer import Trainer

WARM_UP = 3
"""Steps before a rate is measured: the first compiles, the next two record CUDA graphs."""
TOLERANCE = 0.05
"""Relative difference up to which first losses in bf16, or compiled, are those of fp32."""
SMALL_CLIP = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_SDXL: Mapping[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16],
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": [2, 2, 2],
        "cross_attention_dim": 16 + 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "norm_num_groups": 4,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4},
    "text_encoder": SMALL_CLIP | {"hidden_size": 16, "projection_dim": 16},
    "text_encoder_2": SMALL_CLIP | {"hidden_size": 32, "projection_dim": 32},
}
"""Fields of the components of Stable Diffusion XL that are others in the rehearsal."""


def reset_peak() -> None:
    """Begin to look for the peak of memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def describe_peak() -> str:
    """Say how much memory of a GPU was taken at most; empty without one."""
    return f", {naturalsize(torch.cuda.max_memory_allocated(), binary=True)}" if torch.cuda.is_available() else ""


def steps_of(bench: Bench, trainer: Trainer) -> Callable[[], Tensor]:
    """Return what takes a step, and returns its loss, at the peak learning rate."""
    graphs = bench.device == "cuda"

    def step() -> Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return trainer.train_step(trainer.config.learning_rate)[0]

    return step


def measure_steps(bench: Bench, trainer: Trainer) -> tuple[float, list[float], str]:
    """Measure images per second, the first losses, and say so; FailedCheckError for losses that are not finite."""
    step, start = steps_of(bench, trainer), time.perf_counter()
    losses = [step().item()]
    first = time.perf_counter() - start
    losses += [step().item() for _ in range(WARM_UP - 1)]
    if not all(map(isfinite, losses)):
        raise FailedCheckError(f"losses {losses} are not finite")
    reset_peak()
    images = rate(step, trainer.config.images_per_step, bench.sizes.seconds, time.perf_counter)
    return images, losses, f"{images:,.1f} images/s{describe_peak()}, first step {first:.1f} s"


def variants(bench: Bench) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """Precision, and options of torch.compile, of each way to compute a step; the first is what others compare with."""
    compiled: dict[str, Any] = {"dynamic": False}
    graphs = compiled | {"mode": "reduce-overhead"}
    if bench.device == "cpu":
        # Traced alone: a compiler of C++ would take a minute for each.
        compiled, graphs = compiled | {"backend": "aot_eager"}, compiled | {"backend": "aot_eager"}
    return {
        "fp32": ("fp32", None),
        "bf16": ("bf16", None),
        "bf16, compiled": ("bf16", compiled),
        "bf16, compiled, CUDA graphs": ("bf16", graphs),
    }


def training(bench: Bench, data: Path, model: FamilyConfig, **fields: Any) -> Iterator[Measurement]:
    """Measure training in each of ``variants``."""
    known: list[tuple[float, list[float]]] = []

    def work(precision: str, options: Mapping[str, Any] | None) -> Result:
        with bench.trainer(data, model, precision=precision, **fields) as trainer:
            if options is not None:
                trainer.state.network.compile(**options)
            images, losses, words = measure_steps(bench, trainer)
        known.append((images, losses))
        first, expected = known[0]
        if any(abs(loss - other) > TOLERANCE * abs(other) for loss, other in zip(losses, expected, strict=True)):
            raise FailedCheckError(f"{words}; its first losses are {losses}, and in fp32 {expected}")
        return words, images / first

    for name, (precision, options) in variants(bench).items():
        yield name, partial(work, precision, options)


def unet_part(number: int) -> Callable[[Bench], Iterator[Measurement]]:
    """Make the part that trains one of the U-Nets."""

    def part(bench: Bench) -> Iterator[Measurement]:
        size, model = [*bench.sizes.unets.items()][number]
        # At higher rates losses of other precisions soon go ways of their own.
        fields = {"batch_size": bench.sizes.batches[size], "learning_rate": 1e-4}
        for name, work in training(bench, bench.dataset(size), model, **fields):
            yield f"U-Net, {size} px, {name}", work

    return part


def transformer(bench: Bench) -> Iterator[Measurement]:
    """Train all weights of a diffusion transformer of diffusers, on latents."""
    size = 8 * bench.sizes.transformer["sample_size"]
    base = bench.imported("dit", partial(write_dit, bench.sizes))
    options = {"init_from": str(base), "weighting": "plain", "timestep_sampling": "scheduler"}
    fields = options | {"batch_size": bench.sizes.batches[size], "learning_rate": 1e-4}
    for name, work in training(bench, bench.dataset(size, 64), DiffusersConfig(), **fields):
        yield f"DiT, {size} px, {name}", work


def write_dit(sizes: Sizes, folder: Path) -> None:
    """Write a diffusion transformer whose latents have an eighth of the pixels along each side."""
    import diffusers

    from tests.builders.pipelines import write_pipeline

    torch.manual_seed(0)
    kind = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 4}
    network = diffusers.DiTTransformer2DModel(**kind, **sizes.transformer)
    for parameter in network.parameters():  # adaLN-Zero begins as the identity
        torch.nn.init.normal_(parameter, std=0.02)
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    write_pipeline(folder, diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False)))
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "ape", "1": "goldfish"}
    (folder / "model_index.json").write_text(json.dumps(index))


def sdxl(bench: Bench) -> Iterator[Measurement]:
    """Adapt a base of Stable Diffusion XL's size, with checkpointing, an image at a time."""
    size = bench.sizes.sdxl
    name = f"LoRA 16 on Stable Diffusion XL, {size} px"
    fields: dict[str, Any] = {"adapter": {"rank": 16, "alpha": 16}, "weighting": "plain", "batch_size": 1}
    fields |= {"timestep_sampling": "scheduler", "gradient_checkpointing": True, "precision": "bf16", "cpu_threads": 1}

    def steps(trainer: Trainer) -> Result:
        step = steps_of(bench, trainer)
        step()
        synchronize()
        reset_peak()
        start = time.perf_counter()
        losses = [step().item() for _ in range(10)]
        if not all(map(isfinite, losses)):
            raise FailedCheckError(f"losses {losses} are not finite")
        return f"{(time.perf_counter() - start) / 10:.3f} s a step, of 10 steps{describe_peak()}", None

    start = time.perf_counter()
    base = bench.imported("sdxl", partial(write_sdxl, bench))
    written, start = time.perf_counter() - start, time.perf_counter()
    options = {"init_from": str(base), "learning_rate": 1e-4} | fields
    with bench.trainer(bench.dataset(size, 4), DiffusersConfig(), **options) as trainer:
        words = f"{written:.0f} s to write and import it, {time.perf_counter() - start:.0f} s to load and encode images"
        yield f"{name}, set up", lambda: (words, None)
        yield name, partial(steps, trainer)


def write_sdxl(bench: Bench, folder: Path) -> None:
    """Write Stable Diffusion XL with random weights, made on the device and kept in half precision."""
    import diffusers
    import transformers

    from tests.builders.pipelines import clip_tokenizer, write_pipeline
    from tests.builders.published_configs import PUBLISHED

    tokenizer = clip_tokenizer(folder.with_name("tokenizer"))
    tokenizer.model_max_length = 77
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    parts: dict[str, Any] = {}
    with bench.place:
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            kind, config = PUBLISHED["StableDiffusionXLPipeline"][name]
            config = config | (SMALL_SDXL[name] if bench.sizes.sdxl < 1024 else {})
            if hasattr(diffusers, kind):
                parts[name] = getattr(diffusers, kind).from_config(config)
            else:
                text_config = transformers.CLIPTextConfig(**config | ends, pad_token_id=tokenizer.eos_token_id)
                parts[name] = getattr(transformers, kind)(text_config)
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = diffusers.EulerDiscreteScheduler(**options)
    pipeline = diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, add_watermarker=False
    )
    write_pipeline(folder, pipeline.to(torch.bfloat16))


def beside_diffusers(bench: Bench) -> Iterator[Measurement]:
    """Train diffusers' U-Net by the steps of its training script, and the same network here."""
    import diffusers

    size = max(bench.sizes.unets)
    batch, place, known = bench.sizes.batches[size], bench.place, dict[str, float]()

    def network() -> Any:
        torch.manual_seed(0)
        blocks = bench.sizes.blocks
        attention = len(blocks) - 2  # where its script has it
        return diffusers.UNet2DModel(
            sample_size=size,
            layers_per_block=2,
            block_out_channels=blocks,
            down_block_types=tuple(f"{'Attn' * (at == attention)}DownBlock2D" for at in range(len(blocks))),
            up_block_types=tuple(f"{'Attn' * (at == 1)}UpBlock2D" for at in range(len(blocks))),
        )

    def script(precision: Literal["fp32", "bf16"]) -> Result:
        with place:
            _, step, _ = diffusers_recipe(3, size, network().to(place))
            images = torch.rand(batch, 3, size, size)

        def whole() -> None:
            with place, autocast(precision, place):
                step(images, 0.0)

        whole()
        known[precision] = rate(whole, batch, bench.sizes.seconds, time.perf_counter)
        return f"{known[precision]:,.1f} images/s", None

    def write(folder: Path) -> None:
        from tests.builders.pipelines import write_pipeline

        write_pipeline(folder, diffusers.DDPMPipeline(network(), diffusers.DDPMScheduler()))

    def darkroom(precision: str, options: Mapping[str, Any] | None) -> Result:
        fields = {"init_from": str(bench.imported("script", write)), "batch_size": batch}
        fields |= {"weighting": "plain", "timestep_sampling": "scheduler", "learning_rate": 1e-4}
        with bench.trainer(bench.dataset(size), DiffusersConfig(), precision=precision, **fields) as trainer:
            if options is not None:
                trainer.state.network.compile(**options)
            images, _, words = measure_steps(bench, trainer)
        return words, images / known[precision] if precision in known else None

    for precision in ("fp32", "bf16"):
        yield f"diffusers' script, {size} px, {precision}", partial(script, precision)
    for name, (precision, options) in variants(bench).items():
        yield f"Darkroom, the same network, {name}", partial(darkroom, precision, options)


def matrix_products(bench: Bench) -> Iterator[Measurement]:
    """Measure the fastest matrix products, the upper limit of all that follows."""

    def work() -> Result:
        with compute_deterministically(bench.place):
            rates = measure_matrix_products(bench.place, time.perf_counter)
        words = ", ".join(f"{each / 1e12:,.2f} TFLOP/s {name}" for name, each in rates.items())
        return words, rates["bf16"] / rates["fp32"]

    yield "matrix products (fp32 is TF32 on a GPU)", work
