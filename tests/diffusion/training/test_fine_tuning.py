"""Fine-tuning of imported pipelines: what is trained, by which loss, and that it resumes to the same bits."""

import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion.checkpoints import load_model, read_model_header, save_tensors
from diffusion.common.device import CPU
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.model_files import read_header
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.ingest import encodings_folder, forget_encodings
from diffusion.data.latents import LatentCache
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.families.config import DiffusersConfig
from diffusion.families.header import Origin
from diffusion.families.model import ConditioningBatch, to_float
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.generation.config import Conditions
from diffusion.generation.generate import encode_prompts, make_conditioning, sample
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.setup import make_setup
from diffusion.training.train import TrainResult, preflight, train
from diffusion.training.trainer import Trainer
from tests.builders import ROOT
from tests.builders.bucketed import bucketed_set
from tests.builders.masked import read_masked, write_masked
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import FINE_TUNING, SAMPLING, Stop, StopAt

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusion.diffusers_format.adapter import export_adapter  # noqa: E402
from diffusion.diffusers_format.export import export_to_diffusers  # noqa: E402
from diffusion.diffusers_format.import_pipeline import import_pipeline  # noqa: E402
from tests.builders import pipelines  # noqa: E402
from tests.builders.flow_pipelines import FLOW_MAKERS  # noqa: E402

SHORT: dict[str, Any] = FINE_TUNING | {"images": 32}
MAKERS = {**pipelines.MAKERS, **FLOW_MAKERS}
LORA: dict[str, Any] = {"adapter": {"rank": 2, "alpha": 4}}
LABELS = {"class_conditional": ("0", "1", "2"), "dit": ("ape", "goldfish")}
TRAINED = {
    "ddpm": "whole",
    "class_conditional": "lora",
    "latent": "whole",
    "dit": "lora",
    "stable_diffusion": "lora",
    "stable_diffusion_3": "whole",
    **dict.fromkeys(FLOW_MAKERS, "lora"),
}
"""What of each kind is trained in all but the longest tests."""
FAST = ("ddpm", "stable_diffusion")
LONG = ("stable_diffusion_xl", "qwen_image", "sana", "flux_2", "flux_2_klein")


@pytest.fixture(scope="module")
def make_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Write a pipeline of a kind and import it, each once: its folder and its model file."""
    pipelines_by_kind: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in pipelines_by_kind:
            folder = MAKERS[kind](tmp_path_factory.mktemp(kind) / "pipeline")
            import_pipeline(folder, path := folder.with_name("model.safetensors"), Origin(source=kind))
            pipelines_by_kind[kind] = folder, path
        return pipelines_by_kind[kind]

    return make


def data(folder: Path, kind: str, count: int = 24) -> Path:
    captions = [f"a {('red', 'blue')[number % 2]} circle" if number % 5 else None for number in range(count)]
    labels = LABELS.get(kind, ("x",))
    write_dataset(
        folder / kind,
        random_images(count, 3, 16),
        10,
        labels=[labels[number % len(labels)] for number in range(count)],
        captions=captions,
    )
    return folder / kind


def run(
    dataset: Path, output: Path, base: Path, track: Any = lambda _: None, sampling: Any = SAMPLING, **options: Any
) -> TrainResult:
    config = TrainingConfig.model_validate(SHORT | {"init_from": str(base)} | options)
    return train(dataset, output, DiffusersConfig(), config, sampling, track)


def conditions(kind: str) -> Conditions:
    if kind in FLOW_MAKERS or kind.startswith("stable"):
        return Conditions(prompts=("a red circle",))
    return Conditions(labels=("ape",)) if kind == "dit" else Conditions()


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        pytest.param(
            kind,
            lora,
            id=f"{kind}-{name}",
            marks=[pytest.mark.slow] * (kind not in FAST or name != trained)
            + [pytest.mark.long] * (kind in LONG or name != trained),
        )
        for kind, trained in TRAINED.items()
        for name, lora in (("lora", LORA), ("whole", {}))
    ],
)
def test_denoiser_alone_is_trained_and_resumes_bit_for_bit(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    _, base = make_pipeline(kind)
    dataset = data(tmp_path, kind)
    whole = run(dataset, tmp_path / "whole", base, flip=True, **lora)
    header, tensors = read_model_header(whole.final), load_file(whole.final)
    assert header.base is not None
    assert header.base.sha256 == sha256_file(base)
    assert header.guidance == read_model_header(base).guidance
    begun, model = load_model(base), load_model(whole.final)
    assert isinstance(model, PretrainedModel)
    assert isinstance(begun, PretrainedModel)
    denoiser = f"{begun.config.imported.denoiser_name}."
    assert {name.removeprefix("ema.").split(".")[0] + "." for name in tensors} == {denoiser}
    before = begun.network.state_dict()
    changed_names = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed_names
    assert {name.split(".")[0] + "." for name in changed_names} == {denoiser}
    if lora:
        targets = begun.config.imported.adapter_targets
        assert all(name.removesuffix(".weight").endswith(tuple(targets)) for name in changed_names)
    images = sample(model, range(2), 0, SAMPLING, conditions=conditions(kind))
    assert images.shape == (2, 3, 16, 16)
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", base, lambda _: StopAt(16), flip=True, **lora)
    forget_encodings(dataset)
    resumed_run = run(dataset, tmp_path / "cut", base, flip=True, gradient_checkpointing=kind != "dit", **lora)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    assert resumed_run.train_key == whole.train_key


def trainer_of(dataset: Path, base: Path, pool: ThreadPoolExecutor, **options: Any) -> Trainer:
    config = TrainingConfig.model_validate(SHORT | {"init_from": str(base)} | options)
    setup = make_setup(Dataset.open(dataset), DiffusersConfig(), config, SAMPLING, SINGLE_PROCESS, pool.map)
    return Trainer(setup, pool)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("ddpm", "epsilon"), ("ddpm", "v_prediction"), ("ddpm", "sample"), ("stable_diffusion", "epsilon")],
)
def test_plain_loss_is_that_of_diffusers_own_training(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, prediction: str
) -> None:
    """x_t by the scheduler's add_noise, and the mean squared error of what the network predicts there."""
    folder, base = make_pipeline(kind)
    if prediction != "epsilon":
        folder = pipelines.MAKERS[kind](tmp_path / "pipeline", prediction_type=prediction)
        import_pipeline(folder, base := tmp_path / "model.safetensors", Origin(source=kind))
    with worker_threads(1) as pool:
        trainer = trainer_of(data(tmp_path, kind), base, pool, condition_dropout=0)
        batch = trainer.loader.batch(0)
        setup = trainer.setup
        noised = trainer.objective.make_batch(setup.x0(batch), batch.indices, setup.training_conditioning(batch))
        losses = trainer.objective.losses(trainer.state.network, noised)
    assert noised.random["t"].dtype == torch.int64
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    x0, t, noise = noised.x0, noised.random["t"], noised.random["noise"]
    arguments = {}
    if kind == "stable_diffusion":
        images = to_float(setup.dataset.images(batch.rows))
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
        torch.testing.assert_close(x0, latents, rtol=1e-4, atol=1e-5)
        captions = [caption or "" for caption in setup.dataset.captions(batch.rows)]
        assert "" in captions
        ids = pipe.tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        arguments["encoder_hidden_states"] = pipe.text_encoder(ids.input_ids)[0]
    output = pipe.unet(scheduler.add_noise(x0, noise, t), t, **arguments).sample
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction]
    expected = (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


def test_masks_weight_latents_by_the_pixels_they_stand_for(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, base = make_pipeline("stable_diffusion")
    images = write_masked(tmp_path / "images", 24, width=16, height=16)
    read_masked(tmp_path / "masked", images, size=16, mode="rgb", default_caption="a red circle")
    with worker_threads(1) as pool:
        options = {"condition_dropout": 0, "flip": True, "mask": {"min_weight": 0.25}}
        trainer = trainer_of(tmp_path / "masked", base, pool, **options)
        batch, setup = trainer.loader.batch(0), trainer.setup
        plain = trainer.objective.make_batch(setup.x0(batch), batch.indices, setup.training_conditioning(batch))
        losses = trainer.objective.losses(trainer.state.network, setup.with_masks(plain, batch))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    x0, t, noise = plain.x0, plain.random["t"], plain.random["noise"]
    ids = pipe.tokenizer(["a red circle"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0].expand(len(x0), -1, -1)
    squares = (pipe.unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=states).sample - noise).square()
    assert batch.masks is not None
    assert batch.masks.shape[1:] == (16, 16)
    weights = np.maximum(batch.masks.numpy() / 255, 0.25).reshape(len(x0), 8, 2, 8, 2).mean((2, 4))
    expected = (squares.detach().numpy() * weights[:, None]).mean((1, 2, 3))
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_flow_matching_is_trained_as_diffusers_does(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, base = make_pipeline("stable_diffusion_3")
    with worker_threads(1) as pool:
        trainer = trainer_of(data(tmp_path, "stable_diffusion_3"), base, pool, condition_dropout=0)
        batch = trainer.loader.batch(0)
        setup = trainer.setup
        conditioning = setup.training_conditioning(batch)
        noised = trainer.objective.make_batch(setup.x0(batch), batch.indices, conditioning)
        losses = trainer.objective.losses(trainer.state.network, noised)
        many = trainer.objective.make_batch(setup.x0(batch)[:1].expand(4000, -1, -1, -1), range(4000), {}).random["t"]
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    x0, noise, share = noised.x0, noised.random["noise"], ((noised.random["t"] + 1) / 1000).float()
    captions = [caption or "" for caption in setup.dataset.captions(batch.rows)]
    states, _, pooled, _ = pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
    sigma = share[:, None, None, None]
    output = pipe.transformer((1 - sigma) * x0 + sigma * noise, states, pooled, share * 1000).sample
    expected = (output - (noise - x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    # The logit is normal about that of the scheduler's shift, 3.
    logits = torch.logit((many.double() + 1) / 1000)
    assert logits.mean().item() == pytest.approx(np.log(3), abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_dropped_and_missing_captions_are_the_empty_prompt(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, base = make_pipeline("stable_diffusion")
    empty = load_model(base).encode_prompt("")["states"]
    dataset = data(tmp_path, "stable_diffusion")
    with worker_threads(1) as pool:
        for dropout in (0.0, 0.5):
            trainer = trainer_of(dataset, base, pool, condition_dropout=dropout)
            batch = trainer.loader.batch(0)
            text = trainer.setup.training_conditioning(batch)["states"]
            untold = [torch.equal(each, empty) for each in text]
            missing = [caption is None for caption in trainer.setup.dataset.captions(batch.rows)]
            assert any(missing)
            assert all(is_empty for is_empty, is_missing in zip(untold, missing, strict=True) if is_missing)
            assert (sum(untold) > sum(missing)) == (dropout > 0)


def test_fewer_images_are_encoded_at_once_the_larger_they_are(tmp_path: Path) -> None:
    counts = {}
    for size in (64, 256, 512):
        write_dataset(tmp_path / f"{size}", random_images(18, size=size), 40)
        calls = list[int]()

        def encode(images: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
            calls.append(len(images))
            return images[..., ::16, ::16]

        with ThreadPoolExecutor(1) as pool:
            LatentCache(Dataset.open(tmp_path / f"{size}"), "digest", encode, False, pool.map)
        counts[size] = calls
    assert counts == {64: [16, 16], 256: [4] * 5, 512: [1] * 18}


def test_latents_are_of_each_image_and_its_mirror_image(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, base = make_pipeline("stable_diffusion")
    folder, model = data(tmp_path, "stable_diffusion"), load_model(base)
    dataset = Dataset.open(folder)
    assert isinstance(model, PretrainedModel)
    calls: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return model.network.encode(images)

    with ThreadPoolExecutor(2) as pool:
        cache = LatentCache(dataset, "digest", encode, True, pool.map)
        rows, mirrored = np.array([3, 17, 0, 3]), np.array([False, True, True, True])
        images = to_float(dataset.images(rows))
        images[torch.from_numpy(mirrored)] = images[torch.from_numpy(mirrored)].flip(-1)
        with torch.inference_mode():
            torch.testing.assert_close(
                cache.select_rows(rows, mirrored), model.network.encode(images), rtol=1e-4, atol=1e-5
            )
        call_count, files = len(calls), {path: path.read_bytes() for path in encodings_folder(folder).iterdir()}
        LatentCache(dataset, "digest", encode, True, pool.map)
        assert len(calls) == call_count
        damaged_file = next(path for path in files if path.suffix == ".safetensors")
        damaged_file.write_bytes(files[damaged_file][:-1])
        LatentCache(dataset, "digest", encode, True, pool.map)
        assert {path: path.read_bytes() for path in encodings_folder(folder).iterdir()} == files
        assert call_count < len(calls) < 2 * call_count
        LatentCache(dataset, "another", encode, False, pool.map)
        assert len(list(encodings_folder(folder).iterdir())) == 2 * len(files)
    # Mapped files stay readable after a takedown has deleted them.
    before = cache.select_rows(rows)
    remove(folder, Selection(sources=["3.png"]), "consent withdrawn")
    assert not encodings_folder(folder).exists()
    assert torch.equal(cache.select_rows(rows), before)


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in ("ddpm", "ddim", "class_conditional", *LONG)])
def test_encoders_sent_to_other_processes_give_the_same_bits(
    make_pipeline: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    model = load_model(make_pipeline(kind)[1])
    images = torch.rand(3, *model.shape) * 2 - 1
    with torch.inference_mode():
        expected = model.encode(images)
        assert torch.equal(sent(model.for_encoding())(CPU).encode(images), expected)
    if model.config.text:
        load = model.caption_encoder(None, CPU).load
        encoding = sent(load)()("a red circle")
        assert all(torch.equal(encoding[name], value) for name, value in load()("a red circle").items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_text_encoders_are_adapted_too(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str
) -> None:
    _, base = make_pipeline(kind)
    dataset, options = data(tmp_path, kind), {"adapter": LORA["adapter"] | {"text_encoder": True}}
    whole = run(dataset, tmp_path / "whole", base, **options)
    begun, model = load_model(base), load_model(whole.final)
    before = begun.network.state_dict()
    changed_names = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed_names} == {"unet", *model.config.imported.text_encoders}
    assert not torch.equal(model.encode_prompt("a red circle")["states"], begun.encode_prompt("a red circle")["states"])
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", base, lambda _: StopAt(16), **options)
    assert run(dataset, tmp_path / "cut", base, **options).final.read_bytes() == whole.final.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("text_encoder", [False, True], ids=["denoiser", "text encoder too"])
@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_3"])
def test_adapter_in_diffusers_generates_the_same_images(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, text_encoder: bool
) -> None:
    if text_encoder and kind == "stable_diffusion_3":
        pytest.skip("one text encoder alone is adapted")
    folder, base = make_pipeline(kind)
    lora = {"adapter": {"rank": 2, "alpha": 3, "text_encoder": text_encoder}}
    final = run(data(tmp_path, kind), tmp_path / "run", base, **lora).final
    # A few steps change little: matrices as after many.
    generator = torch.Generator().manual_seed(0)
    std = 1.0 if kind == "stable_diffusion_3" else 0.25
    tensors = {name: torch.randn(each.shape, generator=generator) * std for name, each in load_file(final).items()}
    save_tensors(final, tensors, read_header(final))
    adapter = export_adapter(final, tmp_path / "adapter")
    assert set(adapter.files) == {"pytorch_lora_weights.safetensors", "README.md"}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "guidance_scale": 3.0}

    def theirs() -> torch.Tensor:
        images: torch.Tensor = pipe("a red circle", generator=torch.Generator().manual_seed(3), **options).images
        return images

    before = theirs()
    pipe.load_lora_weights(tmp_path / "adapter")
    after = theirs()
    model = load_model(final)
    assert isinstance(model, PretrainedModel)
    prompts = Conditions(prompts=("a red circle",))
    embeddings = encode_prompts(model, prompts)
    conditioning = make_conditioning(model, [0], 0, prompts, embeddings)
    noise = torch.randn(1, *model.noise_shape, generator=torch.Generator().manual_seed(3))
    batch = ConditioningBatch(conditioning, lambda: noise, embeddings[None], None)
    config = sampling_config(sampler="scheduler", steps=4, guidance=3.0, precision="fp32")
    ours = model.sample(batch, config, torch.device("cpu")).float() / 255
    assert (after - before).abs().max() > 0.01
    assert (ours - after).abs().max() < 0.51 / 255


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("ddpm", {"optimizer": "adamw"}, "training.optimizer"),
        ("ddpm", {"shard": True}, "training.shard"),
        ("ddpm", {"tags": {"shuffle": True}}, "training.tags"),
        ("stable_diffusion_3", {"adapter": {"text_encoder": True}}, "text_encoder"),
        ("dit", {"adapter": {"target_modules": ["qkv"]}}, "to_q"),
        ("dit", {"data": "ddpm"}, "knows the classes"),
        ("stable_diffusion", {"data": "without captions"}, "no captions"),
        ("ddpm", {"data": "grey"}, "generates images of 3×16×16"),
    ],
)
def test_what_makes_no_sense_is_named(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, options: dict[str, Any], words: str
) -> None:
    _, base = make_pipeline(kind)
    match options.get("data", kind):
        case "grey":
            write_dataset(dataset := tmp_path / "grey", random_images(8, 1, 16), 8)
        case "without captions":
            write_dataset(dataset := tmp_path / "bare", random_images(8, 3, 16), 8)
        case name:
            dataset = data(tmp_path, name)
    arguments = {name: value for name, value in options.items() if name != "data"}
    config = TrainingConfig.model_validate(SHORT | {"init_from": str(base)} | arguments)
    with pytest.raises(UserError, match=words):
        preflight(dataset, DiffusersConfig(), config, SAMPLING)


def test_tags_of_a_pipeline_s_captions_vary(make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, base = make_pipeline("stable_diffusion")
    write_dataset(dataset := tmp_path / "tags", random_images(8, 3, 16), 8, captions=["red, circle, grey"] * 8)
    with worker_threads(1) as pool:
        trainer = trainer_of(dataset, base, pool, **LORA, condition_dropout=0, tags={"shuffle": True})
        text = trainer.setup.training_conditioning(trainer.loader.batch(0))["states"]
    assert len(text.unique(dim=0)) > 1


def test_dry_run_estimates_and_writes_nothing(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, base = make_pipeline("stable_diffusion")
    dataset = data(tmp_path, "stable_diffusion")
    before = sorted(tmp_path.rglob("*"))
    config = TrainingConfig.model_validate(SHORT | {"init_from": str(base)} | LORA)
    about = preflight(dataset, DiffusersConfig(), config, SAMPLING)
    assert sorted(tmp_path.rglob("*")) == before
    weights = sum(value.numel() for name, value in load_file(base).items() if name.startswith("ema."))
    assert about.parameters < weights / 10
    assert about.flops > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora"), [("stable_diffusion", {}), ("dit", LORA)])
def test_exported_pipeline_has_what_was_trained(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    folder, base = make_pipeline(kind)
    final = run(data(tmp_path, kind), tmp_path / "run", base, **lora).final
    export = export_to_diffusers(final, tmp_path / "pipeline", SAMPLING)
    assert set(export.files) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    pipe, model = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline"), load_model(final)
    assert isinstance(model, PretrainedModel)
    ours = model.network.component(model.config.imported.denoiser_name).state_dict()
    theirs = getattr(pipe, model.config.imported.denoiser_name).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    with pytest.raises(UserError, match="--to diffusers"):
        export_adapter(final, tmp_path / "adapter", file_format="diffusers")


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.diffusion.training.test_fine_tuning import LORA, run
run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), flip=True, images=400, checkpoints=8, **LORA)
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.drill
def test_fine_tuning_is_bit_identical_after_kills(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path, kills: int
) -> None:
    _, base = make_pipeline("stable_diffusion")

    def start(output: str) -> subprocess.Popen[bytes]:
        folder = tmp_path / output / "stable_diffusion"
        if not folder.exists():
            data(tmp_path / output, "stable_diffusion")
        command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / output / "run"), str(base)]
        return subprocess.Popen(command, cwd=ROOT)

    start_time = time.monotonic()
    assert start("whole").wait() == 0
    seconds = time.monotonic() - start_time
    moments = random.Random(0)
    for _ in range(kills):
        process = start("killed")
        try:
            process.wait(moments.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert start("killed").wait() == 0
    whole, killed_file = (tmp_path / name / "run" / "final.safetensors" for name in ("whole", "killed"))
    assert killed_file.read_bytes() == whole.read_bytes()


@pytest.mark.long
@pytest.mark.slow
def test_latents_of_several_shapes_are_cached_and_resumed(
    make_pipeline: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, base = make_pipeline("latent")
    folder = bucketed_set(tmp_path)
    whole = run(folder, tmp_path / "whole", base, flip=True)
    assert len(list(encodings_folder(folder).glob("latents-*.safetensors"))) == 3
    with pytest.raises(Stop):
        run(folder, tmp_path / "cut", base, flip=True, track=lambda _: StopAt(16))
    assert run(folder, tmp_path / "cut", base, flip=True).final.read_bytes() == whole.final.read_bytes()
    assert set(load_model(whole.final).header.trained_shapes) == {(24, 12), (16, 16), (12, 24)}
    config = TrainingConfig.model_validate(SHORT | {"init_from": str(base)})
    assert preflight(folder, DiffusersConfig(), config, SAMPLING).flops > 0
