"""Pipelines of today, as tiny ones with random weights: images are those of diffusers' own pipelines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.device import CPU
from diffusion.common.errors import UserError
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.adapters import LoRAConfig
from diffusion.families.header import Origin
from diffusion.families.model import ConditioningBatch
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.families.text_encoder import stack_encodings
from diffusion.generation.config import Conditions
from diffusion.generation.generate import check_prompts, check_sampling, encode_prompts, make_conditioning, sample
from diffusion.process.editing import Edit
from diffusion.process.samplers import sampling_config
from tests.builders.flow_pipelines import FLOW_MAKERS

Make = Callable[..., tuple[Path, PretrainedModel]]
ONE = Conditions(prompts=("a red circle",))
PROMPTS = ("a red circle", "blue square on the grey photo", "green")
NAMES = {
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
    "flux": "FluxPipeline",
    "flux_2_klein": "Flux2KleinPipeline",
    "z_image": "ZImagePipeline",
    "qwen_image": "QwenImagePipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "flux_2": "Flux2Pipeline",
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, tuple[Path, PretrainedModel]] = {}

    def make(kind: str, **options: Any) -> tuple[Path, PretrainedModel]:
        key = f"{kind} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            source, path = FLOW_MAKERS[kind](folder / "pipeline", **options), folder / "model.safetensors"
            import_pipeline(source, path, Origin(source="tiny"))
            model = load_model(path)
            assert isinstance(model, PretrainedModel)
            made[key] = source, model
        return made[key]

    return make


class Recorder(PretrainedModel):
    """Keeps images as they are before they are rounded."""

    decoded: ClassVar[list[Tensor]] = []

    def decode(self, x: Tensor) -> Tensor:
        self.decoded.append(super().decode(x))
        return self.decoded[-1]


def generate(
    model: PretrainedModel, count: int, size: tuple[int, int], conditions: Conditions, guidance: float | None
) -> Tensor:
    """Generate with noise as diffusers takes it from a generator: (N, H, W, C) in [0, 1]."""
    model, generator = model.with_size(size), torch.Generator().manual_seed(3)
    config = sampling_config(sampler="scheduler", steps=4, precision="fp32", guidance=guidance)
    encodings = encode_prompts(model, conditions)
    conditioning = make_conditioning(model, range(count), 0, conditions, encodings)
    recorder = Recorder(model.header, model.network, model.schedule, model.latents, size=model.size)
    batch = ConditioningBatch(
        conditioning,
        lambda: torch.randn(count, *model.noise_shape, generator=generator),
        encodings[conditions.negative_prompt],
        None,
    )
    recorder.sample(batch, config, CPU)
    return (recorder.decoded.pop() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def generate_by_diffusers(folder: Path, kind: str, count: int, size: tuple[int, int], **options: Any) -> np.ndarray:
    pipeline = getattr(diffusers, NAMES[kind]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    images: np.ndarray = pipeline(
        prompt=list(PROMPTS[:count]),
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).images
    return images


CASES: tuple[tuple[str, dict[str, Any], float | None, dict[str, Any]], ...] = (
    ("stable_diffusion_xl", {}, 5.0, {"guidance_scale": 5.0}),
    ("stable_diffusion_xl", {"zeros": False}, 5.0, {"guidance_scale": 5.0}),
    ("stable_diffusion_xl", {}, None, {"guidance_scale": 1.0}),
    ("flux", {}, 3.5, {"guidance_scale": 3.5}),
    ("flux", {"dev": False}, None, {}),
    ("flux_2_klein", {}, 4.0, {"guidance_scale": 4.0}),
    ("flux_2_klein", {"distilled": True}, None, {}),
    ("flux_2", {}, 4.0, {"guidance_scale": 4.0}),
    ("z_image", {}, 6.0, {"guidance_scale": 5.0}),
    ("z_image", {"dynamic": True}, None, {"guidance_scale": 0.0}),
    ("qwen_image", {}, 4.0, {"true_cfg_scale": 4.0, "negative_prompt": ""}),
    ("qwen_image", {}, None, {"true_cfg_scale": 1.0}),
    ("pixart_sigma", {}, 4.5, {"guidance_scale": 4.5, "use_resolution_binning": False}),
    ("pixart_sigma", {}, None, {"guidance_scale": 1.0, "use_resolution_binning": False}),
    ("sana", {}, 4.5, {"guidance_scale": 4.5, "use_resolution_binning": False}),
    ("sana", {}, None, {"guidance_scale": 1.0, "use_resolution_binning": False}),
    ("sana", {"euler": True}, 4.5, {"guidance_scale": 4.5, "use_resolution_binning": False}),
)


@pytest.mark.parametrize(("count", "size"), [(1, (32, 32)), (3, (32, 64))])
@pytest.mark.parametrize(("kind", "options", "guidance", "call"), CASES)
def test_images_are_those_of_diffusers(
    make: Make,
    kind: str,
    options: dict[str, Any],
    guidance: float | None,
    call: dict[str, Any],
    count: int,
    size: tuple[int, int],
) -> None:
    folder, model = make(kind, **options)
    images = generate(model, count, size, Conditions(prompts=PROMPTS[:count]), guidance)
    call = {name: [value] * count if name == "negative_prompt" else value for name, value in call.items()}
    expected = torch.from_numpy(generate_by_diffusers(folder, kind, count, size, **call))
    assert images.shape == expected.shape
    assert images.std() > 0.02  # of something
    assert (images - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("kind", "guidance", "call"),
    [
        ("stable_diffusion_xl", 5.0, {"guidance_scale": 5.0}),
        ("z_image", 6.0, {"guidance_scale": 5.0}),
        ("qwen_image", 4.0, {"true_cfg_scale": 4.0}),
        ("sana", 4.5, {"guidance_scale": 4.5, "use_resolution_binning": False}),
    ],
)
def test_negative_prompts_are_those_of_diffusers(make: Make, kind: str, guidance: float, call: dict[str, Any]) -> None:
    folder, model = make(kind)
    conditions = Conditions(prompts=PROMPTS[:2], negative_prompt="grey photo")
    images = generate(model, 2, (32, 32), conditions, guidance)
    call = call | {"negative_prompt": ["grey photo"] * 2}
    expected = torch.from_numpy(generate_by_diffusers(folder, kind, 2, (32, 32), **call))
    assert (images - expected).abs().max() < 2e-6


@pytest.mark.parametrize("kind", FLOW_MAKERS)
def test_pipelines_in_half_precision_are_computed_with_in_float32(make: Make, tmp_path: Path, kind: str) -> None:
    folder, whole = make(kind)
    pipeline = getattr(diffusers, NAMES[kind]).from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "half")
    import_pipeline(tmp_path / "half", tmp_path / "model.safetensors", Origin(source="tiny", licence="mit"))
    half = load_model(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in half.network.parameters()} == {torch.float32}
    for name, value in half.encode_prompt("a red circle").items():
        torch.testing.assert_close(value, whole.encode_prompt("a red circle")[name], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", FLOW_MAKERS)
@pytest.mark.parametrize("sampler", ["scheduler", "dpmpp_2m_sde"])
def test_the_bits_of_an_image_depend_on_no_other(make: Make, kind: str, sampler: str) -> None:
    model = make(kind)[1].with_size((16, 32))
    prompts = Conditions(prompts=("a red circle", "grey", None, "blue"))
    config = sampling_config(sampler=sampler, steps=3, compute_batch=2, guidance=3.0)
    images = sample(model, range(4), 0, config, conditions=prompts)
    assert torch.equal(sample(model, [3], 0, config, conditions=prompts)[0], images[3])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("kind", FLOW_MAKERS)
@pytest.mark.parametrize("sampler", ["scheduler", "euler"])
def test_inpainting_keeps_what_is_kept_and_changes_the_rest(make: Make, kind: str, sampler: str) -> None:
    model = make(kind)[1].with_size((16, 32))
    image, mask = torch.full(model.shape, 200, dtype=torch.uint8), torch.zeros(model.shape[1:], dtype=torch.bool)
    mask[:, :16] = True
    config = sampling_config(sampler=sampler, steps=3)
    edit = Edit(image, mask, strength=0.8)
    images = sample(model, range(2), 0, config, conditions=ONE, edit=edit)
    assert torch.equal(images[..., mask], image[..., mask].expand(2, -1, -1))
    assert (images[..., ~mask] != 200).float().mean() > 0.5


@pytest.mark.parametrize("kind", FLOW_MAKERS)
def test_autoencoders_give_latents_of_noise_s_shape_and_distribution(make: Make, kind: str) -> None:
    model = make(kind)[1].with_size((16, 32))
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        z = model.encode(images)
        assert z.shape[1:] == model.noise_shape
        again = model.encode(model.decode(z))
    assert again.shape == z.shape


def test_shown_guidance_changes_images_without_a_second_evaluation(make: Make) -> None:
    model = make("flux")[1].with_size((16, 16))
    low, high = (
        sample(model, [0], 0, sampling_config(sampler="euler", steps=2, guidance=scale), conditions=ONE)
        for scale in (1.0, 9.0)
    )
    assert not torch.equal(low, high)
    assert model.evaluations(sampling_config(sampler="scheduler", steps=4, guidance=3.5)) == 4
    assert make("z_image")[1].evaluations(sampling_config(sampler="scheduler", steps=4, guidance=3.5)) == 8


@pytest.mark.parametrize(
    ("options", "conditions"),
    [
        ({"guidance": 3.5}, Conditions(prompts=("green",), negative_prompt="red")),
        ({"guidance": 3.5, "guidance_interval": (0.2, 5.0)}, Conditions(prompts=("green",))),
        ({"guidance": 3.5, "guidance_rescale": 0.7}, Conditions(prompts=("green",))),
    ],
)
def test_options_without_effect_on_shown_guidance_are_refused(
    make: Make, options: dict[str, Any], conditions: Conditions
) -> None:
    with pytest.raises(UserError, match="guidance"):
        check_sampling(make("flux")[1], sampling_config(**options), conditions)


def test_the_template_of_a_message_counts_for_the_limit_of_prompts(make: Make) -> None:
    _, model = make("flux_2_klein")
    length, empty, limit = model.prompt_length("a red circle")
    assert limit == 512
    assert 0 < empty < length
    check_prompts(Conditions(prompts=("x" * (512 - empty),)), model.prompt_length)
    with pytest.raises(UserError, match="512"):
        check_prompts(Conditions(prompts=("x" * (513 - empty),)), model.prompt_length)


def test_the_template_in_the_files_is_not_run(make: Make, tmp_path: Path) -> None:
    folder, model = make("z_image")
    hostile = Path(shutil.copytree(folder, tmp_path / "hostile"))
    template = "{{ 1 / 0 }}"
    for path in (hostile / "tokenizer").iterdir():
        if path.name == "chat_template.jinja":
            path.write_text(template)
        elif path.name == "tokenizer_config.json" and "chat_template" in (settings := json.loads(path.read_text())):
            path.write_text(json.dumps(settings | {"chat_template": template}))
    import_pipeline(hostile, tmp_path / "model.safetensors", Origin(source="tiny"))
    encoded = load_model(tmp_path / "model.safetensors").encode_prompt("a red circle")
    assert all(torch.equal(value, encoded[name]) for name, value in model.encode_prompt("a red circle").items())


@pytest.mark.parametrize(
    ("kind", "component", "change"),
    [
        ("stable_diffusion_xl", "unet", {"addition_embed_type": "text_image"}),
        ("stable_diffusion_xl", "unet", {"projection_class_embeddings_input_dim": None}),
        ("flux", "transformer", {"in_channels": 64}),
        ("flux", "transformer", {"in_channels": "many"}),
        ("flux", "transformer", {"num_single_layers": 10**4}),
        ("flux_2_klein", "text_encoder", {"num_hidden_layers": 10**5}),
        ("z_image", "transformer", {"cap_feat_dim": 2.5}),
        ("qwen_image", "vae", {"latents_mean": [0.0]}),
        ("qwen_image", "vae", {"temperal_downsample": 3}),
        ("qwen_image", "transformer", {"use_layer3d_rope": True}),
        ("qwen_image", "text_encoder", {"vision_config": {"depth": 10**5}}),
        ("pixart_sigma", "transformer", {"use_additional_conditions": True}),
        ("pixart_sigma", "transformer", {"caption_channels": 64}),
        ("qwen_image", "transformer", {"axes_dims_rope": [8000, 8000, 8000]}),
        ("flux", "transformer", {"axes_dims_rope": [3, 5, 8]}),
        ("z_image", "transformer", {"axes_lens": [10**5, 512, 512]}),
        ("z_image", "transformer", {"axes_lens": [64, 64, 64]}),
        ("flux_2_klein", "text_encoder", {"num_hidden_layers": 3}),
        ("stable_diffusion_xl", "unet", {"addition_time_embed_dim": 256}),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    make: Make, tmp_path: Path, kind: str, component: str, change: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(make(kind)[0], tmp_path / "changed"))
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        import_pipeline(folder, tmp_path / "model.safetensors", Origin(source="tiny"))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("flux", {"base_shift": None}),
        ("flux", {"base_image_seq_len": 4096}),
        ("flux", {"max_shift": "1.15"}),
        ("flux", {"base_shift": 1e29}),
        ("flux", {"max_shift": -1e29}),
        ("flux", {"num_train_timesteps": 0}),
        ("flux", {"time_shift_type": "linear", "base_shift": -1, "max_shift": -1}),
        ("z_image", {"shift": -1}),
        ("z_image", {"shift": 0}),
        ("z_image", {"num_train_timesteps": None}),
        ("stable_diffusion_xl", {"num_train_timesteps": 0}),
        ("stable_diffusion_xl", {"trained_betas": 0.5}),
        ("stable_diffusion_xl", {"timestep_spacing": "none"}),
        ("pixart_sigma", {"solver_order": "many"}),
        ("pixart_sigma", {"beta_end": -1}),
    ],
)
def test_schedulers_that_cannot_generate_are_refused(
    make: Make, tmp_path: Path, kind: str, change: dict[str, Any]
) -> None:
    folder = changed(make(kind)[0], tmp_path / "changed", {"scheduler/scheduler_config.json": change})
    with pytest.raises(UserError) as raised:
        import_pipeline(folder, tmp_path / "model.safetensors", Origin(source="tiny"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("kind", "name"), [("flux", "tokenizer"), ("flux", "tokenizer_2"), ("z_image", "tokenizer")])
def test_tokenizers_without_vocabulary_are_refused(make: Make, tmp_path: Path, kind: str, name: str) -> None:
    folder = changed(make(kind)[0], tmp_path / "changed", {})
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
        (folder / name / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match=name):
        import_pipeline(folder, tmp_path / "model.safetensors", Origin(source="tiny"))


@pytest.mark.parametrize("zeros", [True, False])
def test_tokens_of_sdxl_are_worth_what_prompts_are(make: Make, zeros: bool) -> None:
    model = make("stable_diffusion_xl", zeros=zeros)[1].with_size((16, 32))
    tokens = model.caption_encoder(LoRAConfig(text_encoder=True), CPU)
    tokenize, prompts = tokens.load(), ("a red circle", None)
    x = torch.randn(2, *model.noise_shape, generator=torch.Generator().manual_seed(2))
    shown, encoded = (
        model.network(x, torch.tensor([10.0, 500.0]), **stack_encodings(encodings))
        for encodings in (
            [tokens.none if prompt is None else tokenize(prompt) for prompt in prompts],
            [model.encode_prompt(prompt) for prompt in prompts],
        )
    )
    torch.testing.assert_close(shown, encoded, rtol=0, atol=1e-5)


def test_every_adapted_layer_of_sdxl_s_text_encoders_has_an_effect(make: Make) -> None:
    model = make("stable_diffusion_xl")[1].with_size((16, 32))
    adapter = LoRAConfig(rank=2, text_encoder=True)
    subset, tokens = model.make_trainable(adapter), model.caption_encoder(adapter, CPU)
    names = {name.partition(".")[0] for name, _ in subset.named_parameters()}
    assert names == {"unet", "text_encoder", "text_encoder_2"}
    generator = torch.Generator().manual_seed(2)
    for weight in subset.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    x = torch.randn(1, *model.noise_shape, generator=generator)
    subset(x, torch.tensor([300.0]), **stack_encodings([tokens.load()("a red circle")])).square().sum().backward()
    assert not [name for name, weight in subset.named_parameters() if weight.grad is None or not weight.grad.any()]


@pytest.mark.parametrize("kind", FLOW_MAKERS)
def test_all_that_is_trained_has_an_effect(make: Make, kind: str) -> None:
    model = make(kind)[1].with_size((16, 24))
    subset = model.make_trainable(None)
    generator = torch.Generator().manual_seed(2)
    encodings = stack_encodings(model.encode_prompt(prompt) for prompt in PROMPTS[:2])
    x = torch.randn(2, *model.noise_shape, generator=generator)
    subset(x, torch.tensor([10.0, 50.0]), **encodings).square().sum().backward()
    idle = {name for name, weight in subset.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert not idle


def changed(folder: Path, copy: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """Copy a pipeline with other values in its JSON files."""
    shutil.copytree(folder, copy)
    for name, values in changes.items():
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | values))
    return copy


def imported(folder: Path) -> PretrainedModel:
    import_pipeline(folder, folder / "model.safetensors", Origin(source="tiny"))
    model = load_model(folder / "model.safetensors")
    assert isinstance(model, PretrainedModel)
    return model


@pytest.mark.parametrize(
    ("kind", "changes", "guidance", "call"),
    [
        (
            "stable_diffusion_xl",
            {"vae/config.json": {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 2.0, 0.8, 1.1]}},
            5.0,
            {"guidance_scale": 5.0},
        ),
        ("z_image", {"tokenizer/tokenizer_config.json": {"padding_side": "left"}}, 6.0, {"guidance_scale": 5.0}),
        (
            "qwen_image",
            {"tokenizer/tokenizer_config.json": {"padding_side": "left"}},
            4.0,
            {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
        ),
        (
            "flux",
            {"scheduler/scheduler_config.json": {"use_beta_sigmas": True, "time_shift_type": "linear"}},
            3.5,
            {"guidance_scale": 3.5},
        ),
    ],
)
def test_images_of_other_settings_are_those_of_diffusers(
    make: Make,
    tmp_path: Path,
    kind: str,
    changes: dict[str, dict[str, Any]],
    guidance: float,
    call: dict[str, Any],
) -> None:
    folder = changed(make(kind)[0], tmp_path / "changed", changes)
    images = generate(imported(folder), 2, (32, 48), Conditions(prompts=PROMPTS[:2]), guidance)
    expected = torch.from_numpy(generate_by_diffusers(folder, kind, 2, (32, 48), **call))
    assert (images - expected).abs().max() < 5e-6


def test_a_text_encoder_saved_with_its_head_is_loaded_without(make: Make, tmp_path: Path) -> None:
    folder, model = make("z_image")
    saved = transformers.Qwen3Model.from_pretrained(folder / "text_encoder")
    whole = transformers.Qwen3ForCausalLM(saved.config)
    whole.model.load_state_dict(saved.state_dict())
    copy = changed(folder, tmp_path / "changed", {})
    shutil.rmtree(copy / "text_encoder")
    whole.save_pretrained(copy / "text_encoder")
    again = imported(copy).encode_prompt("a red circle")
    assert all(torch.equal(value, again[name]) for name, value in model.encode_prompt("a red circle").items())


@pytest.mark.parametrize("kind", ["stable_diffusion_xl", "flux", "qwen_image"])
def test_an_edit_begins_where_that_of_diffusers_does(make: Make, kind: str) -> None:
    folder, model = make(kind)
    name = NAMES[kind].replace("Pipeline", "Img2ImgPipeline")
    pipeline = getattr(diffusers, name).from_pipe(getattr(diffusers, NAMES[kind]).from_pretrained(folder))
    for steps, strength in ((28, 0.6), (10, 0.35), (4, 1.0), (5, 0.05)):
        pipeline.scheduler.set_timesteps(**model.pipeline.timesteps(pipeline.scheduler, steps, (4, 16, 16)))
        begun, _ = pipeline.get_timesteps(steps, strength, "cpu")
        assert model.pipeline.first_step(steps, strength) == steps - max(len(begun), 1)
