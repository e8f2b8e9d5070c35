"""Imported pipelines generate what diffusers' own pipelines do, and more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.families.header import Origin
from diffusion.families.model import ConditioningBatch
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.families.pretrained.stable_diffusion_3 import StableDiffusion3Pipeline
from diffusion.generation.config import UNCONDITIONAL, Conditions, make_request
from diffusion.generation.generate import check_prompts, encode_prompts, make_conditioning, sample
from diffusion.generation.requests import answer
from diffusion.process.editing import Edit
from diffusion.process.samplers import sampling_config

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusion.diffusers_format.import_pipeline import import_pipeline  # noqa: E402
from tests.builders import pipelines  # noqa: E402
from tests.builders.small_models import write_model  # noqa: E402

COUNT = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, PretrainedModel]]:
    """Write a pipeline of a kind, with options of its scheduler, and import it; each once."""
    pipelines_by_key: dict[str, tuple[Path, PretrainedModel]] = {}

    def make(kind: str, **options: Any) -> tuple[Path, PretrainedModel]:
        key = f"{kind} {options}"
        if key not in pipelines_by_key:
            folder = pipelines.MAKERS[kind](tmp_path_factory.mktemp(kind) / "pipeline", **options)
            import_pipeline(folder, path := folder.with_name("model.safetensors"), Origin(source=kind))
            model = load_model(path)
            assert isinstance(model, PretrainedModel)
            pipelines_by_key[key] = folder, model
        return pipelines_by_key[key]

    return make


def ours(
    model: PretrainedModel,
    conditions: Conditions = UNCONDITIONAL,
    edit: Edit | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Generate with noise from a generator, as diffusers' pipelines take it, or with the first one given."""
    generator = torch.Generator().manual_seed(3)
    config = sampling_config(**{"sampler": "scheduler", "steps": 5, "precision": "fp32", **options})
    embeddings = encode_prompts(model, conditions)
    conditioning = make_conditioning(model, range(COUNT), 0, conditions, embeddings)
    initial_noise = [] if noise is None else [noise]
    batch = ConditioningBatch(
        conditioning,
        lambda: initial_noise.pop() if initial_noise else torch.randn(COUNT, *model.noise_shape, generator=generator),
        embeddings[conditions.negative_prompt],
        edit,
    )
    return model.sample(batch, config, CPU)


def assert_same(images: Tensor, theirs: np.ndarray) -> None:
    """Assert that ``images``, (N, C, H, W) uint8, are ``theirs``, (N, H, W, C) in [0, 1], but for rare roundings."""
    expected = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255
    assert images.shape == expected.shape
    assert (images - expected).abs().max() < 0.51
    assert images.float().std() > 5  # of something


def theirs(folder: Path, kind: str, **options: Any) -> np.ndarray:
    # diffusers loads no pipeline without them, unless it is told that there are none.
    missing = [
        name
        for name in StableDiffusion3Pipeline.optional
        if kind == "StableDiffusion3Pipeline" and not (folder / name).is_dir()
    ]
    pipeline = getattr(diffusers, kind).from_pretrained(folder, **dict.fromkeys(missing))
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(
        num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="np", **options
    ).images
    return images


@pytest.mark.parametrize(
    ("kind", "pipeline", "scheduler"),
    [
        ("ddpm", "DDPMPipeline", {}),
        (
            "ddpm",
            "DDPMPipeline",
            {"variance_type": "fixed_large", "clip_sample": False, "timestep_spacing": "trailing"},
        ),
        ("ddim", "DDIMPipeline", {}),
        ("ddim", "DDIMPipeline", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        ("latent", "LDMPipeline", {}),
    ],
)
def test_unconditional_pipelines_generate_what_diffusers_does(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]], kind: str, pipeline: str, scheduler: dict[str, Any]
) -> None:
    folder, model = make_pipeline(kind, **scheduler)
    assert_same(ours(model), theirs(folder, pipeline, batch_size=COUNT))


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_dit_generates_what_diffusers_does(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]], guidance: float | None
) -> None:
    folder, model = make_pipeline("dit")
    assert model.classes == ["ape", "goldfish", "tench, Tinca tinca"]
    images = ours(model, Conditions(labels=("goldfish", "tench, Tinca tinca")), guidance=guidance)
    assert_same(images, theirs(folder, "DiTPipeline", class_labels=[1, 0], guidance_scale=guidance or 1.0))


SCHEDULERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "beta_schedule": "scaled_linear"}),
    ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
    ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    ("HeunDiscreteScheduler", {"steps_offset": 1}),
    ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is outdated:FutureWarning", "ignore:.*clip_sample:FutureWarning")
@pytest.mark.parametrize(("scheduler", "options"), SCHEDULERS)
def test_stable_diffusion_generates_what_diffusers_does(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]], scheduler: str, options: dict[str, Any]
) -> None:
    folder, model = make_pipeline("stable_diffusion", scheduler=getattr(diffusers, scheduler)(**options))
    prompts = ("a red circle", "blue square on the grey")
    images = ours(model, Conditions(prompts=prompts, negative_prompt="green"), guidance=7.5)
    expected = theirs(
        folder, "StableDiffusionPipeline", prompt=list(prompts), negative_prompt=["green"] * 2, guidance_scale=7.5
    )
    assert_same(images, expected)


def test_no_prompt_and_rescaled_guidance_are_as_in_diffusers(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    folder, model = make_pipeline("stable_diffusion")
    images = ours(model, Conditions(prompts=("a red circle", None)), guidance=5.0, guidance_rescale=0.7)
    expected = theirs(
        folder, "StableDiffusionPipeline", prompt=["a red circle", ""], guidance_scale=5.0, guidance_rescale=0.7
    )
    assert_same(images, expected)


@pytest.mark.parametrize(("t5", "shifting"), [(True, False), (False, True)])
def test_stable_diffusion_3_generates_what_diffusers_does(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]], t5: bool, shifting: bool
) -> None:
    folder, model = make_pipeline("stable_diffusion_3", t5=t5, use_dynamic_shifting=shifting)
    images = ours(model, Conditions(prompts=("a red circle", "a photo")), guidance=4.0)
    assert_same(
        images, theirs(folder, "StableDiffusion3Pipeline", prompt=["a red circle", "a photo"], guidance_scale=4.0)
    )


def test_euler_at_the_levels_of_a_flow_is_its_scheduler(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    _, model = make_pipeline("stable_diffusion_3", t5=False)
    conditions = Conditions(prompts=("a red circle",))
    scheduler = model.pipeline.make_scheduler(8, model.noise_shape, torch.device("cpu"))
    shares = scheduler.sigmas.double().clamp(max=1 - 2**-12)
    conditioning = make_conditioning(model, range(COUNT), 0, conditions)
    noise = torch.randn(COUNT, *model.noise_shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        x = sampling_config(sampler="euler").run(model.denoiser(conditioning), shares / (1 - shares), lambda: noise)
        images = model.decode(x)
    expected = ours(model, conditions, steps=8)
    assert (((images + 1) * 127.5).clamp(0, 255) - expected).abs().max() < 1.0


def test_ddim_at_the_levels_of_a_scheduler_is_that_scheduler(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    _, model = make_pipeline("ddim", **options)
    sigmas = model.schedule.sigmas[model.pipeline.make_scheduler(10, model.noise_shape, torch.device("cpu")).timesteps]
    noise = torch.randn(COUNT, *model.noise_shape, generator=torch.Generator().manual_seed(3))
    denoise = model.denoiser()
    start = noise * (1 + float(sigmas[0]) ** 2) ** 0.5 / float(sigmas[0])  # x_t at unit variance
    with torch.inference_mode():
        ddim = sampling_config(sampler="ddim").run
        unclipped = type(denoise)(denoise.network, denoise.schedule, denoise.parametrization, clip=False)
        images = ddim(unclipped, torch.cat([sigmas, sigmas.new_zeros(1)]), lambda: start)
    expected = ours(model, noise=noise, steps=10)
    assert (((images + 1) * 127.5).clamp(0, 255) - expected).abs().max() < 1.0


@pytest.mark.parametrize("kind", ["ddpm", "latent", "stable_diffusion", "stable_diffusion_3"])
@pytest.mark.parametrize("sampler", ["scheduler", "dpmpp_2m_sde"])
def test_the_bits_of_an_image_depend_on_no_other(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]], kind: str, sampler: str
) -> None:
    _, model = make_pipeline(kind)
    prompts = ("a red circle", "grey", None, "blue") if model.config.text else ()
    config = sampling_config(sampler=sampler, steps=3, compute_batch=2)
    all_of_them = sample(model, range(4), 0, config, conditions=Conditions(prompts=prompts))
    again = sample(model, [3], 0, config, conditions=Conditions(prompts=prompts))
    assert torch.equal(again[0], all_of_them[3])
    assert not torch.equal(all_of_them[0], all_of_them[1])


def test_img2img_by_the_scheduler_is_that_of_diffusers(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    folder, model = make_pipeline(
        "stable_diffusion", scheduler=diffusers.EulerDiscreteScheduler(num_train_timesteps=100)
    )
    image = torch.randint(0, 256, model.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = ours(model, Conditions(prompts=("a red circle",)), Edit(image, strength=0.6), guidance=3.0)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    latents = model.encode(image[None].float() / 127.5 - 1)  # the mean, where the pipeline samples
    expected = pipeline(
        prompt=["a red circle"] * COUNT,
        image=latents.expand(COUNT, -1, -1, -1),
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    assert_same(images, expected)


@pytest.mark.parametrize("sampler", ["scheduler", "euler"])
@pytest.mark.parametrize("kind", ["ddpm", "stable_diffusion", "stable_diffusion_3"])
def test_inpainting_keeps_what_is_kept_and_changes_the_rest(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]], kind: str, sampler: str
) -> None:
    _, model = make_pipeline(kind)
    image = torch.full(model.shape, 200, dtype=torch.uint8)
    mask = torch.zeros(model.shape[1:], dtype=torch.bool)
    mask[:, :8] = True
    images = ours(model, edit=Edit(image, mask), sampler=sampler)
    assert torch.equal(images[..., mask], image[..., mask].expand(COUNT, -1, -1))
    assert (images[..., ~mask] != 200).float().mean() > 0.5


def test_repaint_and_pigdm_need_a_sampler_of_ours(make_pipeline: Callable[..., tuple[Path, PretrainedModel]]) -> None:
    _, model = make_pipeline("ddpm")
    image, mask = torch.zeros(model.shape, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    with pytest.raises(UserError, match="scheduler"):
        ours(model, edit=Edit(image, mask, guided=True))
    ours(model, edit=Edit(image, mask, guided=True), sampler="euler")


def test_the_tokenizer_of_the_pipeline_limits_prompts(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    _, model = make_pipeline("stable_diffusion")
    check_prompts(Conditions(prompts=("red " * 14,)), model.prompt_length)
    with pytest.raises(UserError, match="17 word pieces, and 16 are read"):
        check_prompts(Conditions(prompts=("red " * 15,)), model.prompt_length)
    with pytest.raises(UserError):
        check_prompts(Conditions(prompts=(" ",)), model.prompt_length)


def test_requests_have_the_pipeline_s_guidance_unless_they_name_another(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    _, model = make_pipeline("stable_diffusion")
    sampling = sampling_config(sampler="scheduler", steps=3, compute_batch=2)
    prompt = {"task": "sample", "prompt": "a red circle"}
    requests = [{}, {"guidance": 7.5}, {"guidance": 1}]
    default, same, none = answer(model, [make_request(prompt | each) for each in requests], sampling)
    assert torch.equal(default, same)
    assert not torch.equal(default, none)


def test_a_network_of_classes_alone_is_not_guided(make_pipeline: Callable[..., tuple[Path, PretrainedModel]]) -> None:
    folder, model = make_pipeline("class_conditional")
    config = sampling_config(sampler="scheduler", steps=3, compute_batch=2)
    with pytest.raises(UserError, match=r"sampling\.guidance"):
        sample(model, [0], 0, config.with_changes({"guidance": 3.0}))
    with pytest.raises(UserError, match="label"):
        sample(model, [0], 0, config, conditions=Conditions(labels=(None,)))
    images = sample(model, [0, 1], 0, config, conditions=Conditions(labels=("0", "2")))
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    x = torch.randn(COUNT, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    expected = unet(x, 7, class_labels=torch.tensor([0, 2])).sample
    with torch.inference_mode():
        prediction = model.network.predict(x, torch.tensor(7), label=torch.tensor([0, 2]))
    assert torch.allclose(prediction, expected, atol=1e-5)
    assert not torch.equal(images[0], images[1])


def test_a_network_of_unknown_prediction_has_its_own_scheduler(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    folder, model = make_pipeline("stable_diffusion", scheduler=diffusers.LCMScheduler())
    sampling = model.header.sampling(sampling_config(sampler="euler", steps=4))
    assert sampling.sampler == "scheduler"
    images = ours(model, Conditions(prompts=("a red circle",)), steps=5)
    assert_same(images, theirs(folder, "StableDiffusionPipeline", prompt=["a red circle"] * 2, guidance_scale=1.0))
    with pytest.raises(UserError, match="scheduler"):
        ours(model, sampler="euler")


def test_held_out_losses_are_of_the_pipelines_noise_levels(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    x0 = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind in ("ddpm", "stable_diffusion_3"):
        _, model = make_pipeline(kind)
        with torch.inference_mode():
            terms = model.terms(x0, make_conditioning(model, range(2), 0), [0, 1])
        assert terms.losses.isfinite().all()
        assert (terms.bits is None) == (kind == "stable_diffusion_3")


def test_models_trained_here_have_no_scheduler(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "model.safetensors", 0, 0))
    with pytest.raises(UserError, match="imported pipeline"):
        sample(model, [0], 0, sampling_config(sampler="scheduler", compute_batch=1))


def test_more_steps_than_there_are_levels_are_rejected(
    make_pipeline: Callable[..., tuple[Path, PretrainedModel]],
) -> None:
    _, model = make_pipeline("ddpm")
    with pytest.raises(UserError, match=r"sampling\.steps"):
        ours(model, steps=101)
