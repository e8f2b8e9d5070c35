"""Models conditioned on classes and captions, from training to images that show the condition."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from diffusion.checkpoints import load_model, read_model_header, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.ingest import forget_encodings
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import Evaluator
from diffusion.families.config import ModelConfig
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.text_encoder import ENCODER, WIDTH, TextEncoder
from diffusion.generation.config import Conditions, check_conditions
from diffusion.generation.generate import check_prompts, label_names, make_conditioning, sample
from diffusion.process.samplers import SAMPLING_ADAPTER, SamplingConfig, sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.identity import train_key
from diffusion.training.setup import drop_conditioning, make_setup
from diffusion.training.train import TrainResult, preflight, train
from tests.builders.captioned import COLOURS, FakeEncoder, colours, needs_encoder, squares
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import write_model
from tests.builders.training_runs import Away, Stop, StopAt

SHAPE = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=2)
MODEL = SHAPE.model_copy(update={"text": True})
CONFIG = TrainingConfig(dataset="squares", images=320, batch_size=16, warmup_images=32, checkpoints=4, keep=2)
SAMPLING = sampling_config(sampler="dpmpp_2m", steps=4, compute_batch=8)
GUIDED = SAMPLING.model_copy(update={"guidance": 3.0, "guidance_interval": (0.1, 20.0), "guidance_rescale": 0.7})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    squares(tmp_path / "data" / "squares", labelled=True, every=2)
    return tmp_path / "data" / "squares"


def run(data: Path, output: Path, model: ModelConfig = MODEL, **options: object) -> TrainResult:
    return train(data, output, model, CONFIG, options.pop("sampling", SAMPLING), **options)  # type: ignore[arg-type]


@pytest.fixture
def model(data: Path, tmp_path: Path, fake_encoder: FakeEncoder) -> DiffusionModel:
    """Told both, and hardly trained."""
    return load_model(run(data, tmp_path / "run").final)


@pytest.mark.slow
def test_stopped_run_resumes_bit_for_bit_with_its_text_encoder(
    data: Path, tmp_path: Path, fake_encoder: FakeEncoder
) -> None:
    whole = run(data, tmp_path / "whole", sampling=GUIDED)
    with pytest.raises(Stop):
        run(data, tmp_path / "cut", sampling=GUIDED, track=lambda _: StopAt(112))
    resumed_run = run(data, tmp_path / "cut", sampling=GUIDED)
    assert resumed_run.final.read_bytes() == whole.final.read_bytes()
    last = "samples/0000000320.png"
    assert (tmp_path / "cut" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    header = read_header(tmp_path / "cut" / "checkpoints" / "0000000320.safetensors")["model_header"]
    assert header["encoder"] == ENCODER.model_dump()
    assert load_model(whole.final).header.encoder == ENCODER
    plain = run(data, tmp_path / "plain", SHAPE)
    assert load_model(plain.final).header.encoder is None


@pytest.mark.slow
def test_streamed_shards_give_the_weights_of_local_ones(data: Path, tmp_path: Path, fake_encoder: FakeEncoder) -> None:
    local = run(data, tmp_path / "local").final.read_bytes()
    store = Away(data, tmp_path / "remote")
    streaming = CONFIG.model_copy(update={"stream_bytes": 2**20})
    forget_encodings(data)
    streamed = train(data, tmp_path / "streamed", MODEL, streaming, SAMPLING, store=store)
    assert streamed.final.read_bytes() == local


def test_prompts_are_read_as_training_reads_captions(data: Path, tmp_path: Path, fake_encoder: FakeEncoder) -> None:
    with pytest.raises(Stop):
        run(data, tmp_path / "run", track=lambda _: StopAt(0))
    model = load_model(tmp_path / "run" / "checkpoints" / "0000000000.safetensors")
    with closing(Dataset.open(data)) as dataset, ThreadPoolExecutor(1) as pool:
        setup = make_setup(dataset, MODEL, CONFIG, SAMPLING, SINGLE_PROCESS, pool.map)
        assert setup.captions is not None
        assert setup.captions.encoding.moments == model.header.caption_moments is not None
        rows = dataset.rows("train")
        shown, texts = setup.captions.select_rows(rows), dataset.captions(rows)
    assert not all(texts)
    for name, values in shown.items():
        assert torch.equal(values, torch.stack([model.encode_prompt(text)[name] for text in texts]))


def test_a_warm_start_reads_captions_as_its_initial_model(
    data: Path, tmp_path: Path, fake_encoder: FakeEncoder
) -> None:
    with pytest.raises(Stop):
        run(data, tmp_path / "run", track=lambda _: StopAt(0))
    file = tmp_path / "run" / "checkpoints" / "0000000000.safetensors"
    others, names = tmp_path / "others", [list(COLOURS)[number % 3] for number in range(32)]
    captions = [f"number {number}" for number in range(32)]
    write_dataset(others, random_images(32, channels=3), 32, labels=names, captions=captions)
    warm = CONFIG.model_copy(update={"init_from": str(file)})
    with closing(Dataset.open(others)) as dataset, ThreadPoolExecutor(1) as pool:
        setups = [make_setup(dataset, MODEL, each, SAMPLING, SINGLE_PROCESS, pool.map) for each in (warm, CONFIG)]
    moments = [setup.model_header(0).caption_moments for setup in setups]
    assert moments[0] == read_model_header(file).caption_moments != moments[1]


def test_files_from_before_have_sentence_vectors_alone(tmp_path: Path, fake_encoder: FakeEncoder) -> None:
    vector = MODEL.model_copy(update={"text_tokens": 0})
    path = write_model(tmp_path / "model.safetensors", 0, 0, channels=3, config=vector)
    header = read_header(path)
    del header["model_header"]["model"]["text_tokens"]
    save_tensors(tmp_path / "old.safetensors", load_file(path), header)
    new, old = load_model(path), load_model(tmp_path / "old.safetensors")
    assert old.header == new.header
    assert old.encode_prompt("red square").keys() == {"text"}
    assert torch.equal(old.encode_prompt("red square")["text"], fake_encoder("red square"))
    about = MODEL.model_dump(mode="json")
    assert vector.identity() == about
    assert MODEL.identity() == about | {"text_tokens": 32}


@pytest.mark.slow
def test_another_encoder_is_another_run_and_named(
    data: Path, tmp_path: Path, fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = run(data, tmp_path / "run").final
    other = TextEncoder(name="newer", digest="b" * 64)
    keys = [train_key("0" * 64, each, CONFIG) for each in (MODEL, SHAPE)]
    monkeypatch.setattr("diffusion.families.ddpm.model.ENCODER", other)
    assert [train_key("0" * 64, each, CONFIG) == key for each, key in zip((MODEL, SHAPE), keys, strict=True)] == [
        False,
        True,
    ]
    with pytest.raises(UserError, match=rf"differs in the text encoder \(all-MiniLM-L6-v2 {ENCODER.digest[:12]}\)"):
        run(data, tmp_path / "run")
    monkeypatch.setattr("diffusion.families.text_encoder.ENCODER", other)
    with pytest.raises(UserError, match="captions were read by all-MiniLM-L6-v2"):
        sample(load_model(final), [0], 0, SAMPLING, conditions=Conditions(prompts=("red square",)))
    assert sample(load_model(final), [0], 0, SAMPLING).shape == (1, 3, 8, 8)


def test_data_set_without_captions_fails_before_training(
    dataset: Path, tmp_path: Path, fake_encoder: FakeEncoder
) -> None:
    with pytest.raises(UserError, match=r"blobs has no captions, and the network is conditioned on them \(model\.text"):
        run(dataset, tmp_path / "run")
    with pytest.raises(UserError, match="has no captions"):
        preflight(dataset, MODEL, CONFIG, SAMPLING)
    assert not (tmp_path / "run").exists()


def test_names_that_fit_no_image_are_reported_before_captions_are_read(
    data: Path, tmp_path: Path, fake_encoder: FakeEncoder
) -> None:
    config = CONFIG.model_copy(update={"weights": {"cows": 2.0}})
    with pytest.raises(UserError, match=r"^training\.weights has 'cows'"):
        train(data, tmp_path / "run", MODEL, config, SAMPLING)
    assert not fake_encoder.read


def test_a_dry_run_counts_captions_and_keeps_nothing(data: Path, fake_encoder: FakeEncoder) -> None:
    before = sorted(data.parent.rglob("*"))
    about = preflight(data, MODEL, CONFIG, SAMPLING)
    assert sorted(data.parent.rglob("*")) == before
    assert "3 classes, 3 captions" in dict(about.lines())["images"]


def test_a_dry_run_counts_captions_of_training_images_alone(tmp_path: Path, fake_encoder: FakeEncoder) -> None:
    captions = [f"number {number}" if number else None for number in range(32)]
    write_dataset(tmp_path / "own", random_images(32, channels=3), 32, captions=captions)
    about = preflight(tmp_path / "own", MODEL, CONFIG, SAMPLING)
    assert (about.captions, about.train, about.held_out) == (24, 24, 8)


@given(st.floats(0, 0.5), st.integers(0, 2**32))
def test_class_and_caption_dropout_share_one_random_number(share: float, seed: int) -> None:
    u = torch.rand(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    label, text = torch.arange(400) % 3, torch.ones(400, 384)
    both, classes, captions = (
        drop_conditioning(conditioning, u, share, 3, {"text": torch.zeros(WIDTH)})
        for conditioning in ({"label": label, "text": text}, {"label": label}, {"text": text})
    )
    unlabelled, unread = both["label"] == 3, ~both["text"].any(1)
    # Told nothing are the same images whatever there is to be told, and they are as many as was said.
    assert torch.equal(unlabelled & unread, u < share)
    assert torch.equal(classes["label"] == 3, u < share)
    assert torch.equal(~captions["text"].any(1), u < share)
    # As many more, half each, are told one of the two; what is told is true.
    one = unlabelled ^ unread
    assert torch.equal(one, (u >= share) & (u < 2 * share))
    assert not share or abs((one & unread).sum() - (one & unlabelled).sum()) <= 5 * one.sum() ** 0.5
    assert torch.equal(both["label"][~unlabelled], label[~unlabelled])
    assert both["text"][~unread].eq(1).all()


CONDITIONS = Conditions(
    labels=("red", None, "blue"), prompts=("red square", "blue square", None, "green"), negative_prompt="green square"
)


@pytest.mark.parametrize(
    "conditions", [Conditions(), Conditions(labels=("blue",)), Conditions(prompts=("red", "blue", "green")), CONDITIONS]
)
def test_image_does_not_depend_on_the_batch(model: DiffusionModel, conditions: Conditions) -> None:
    many = sample(model, range(20), 7, GUIDED, conditions=conditions)
    shuffled = sample(model, [19, 0, 13], 7, GUIDED, conditions=conditions)
    assert torch.equal(shuffled, many[[19, 0, 13]])
    assert torch.equal(sample(model, [13], 7, GUIDED, conditions=conditions)[0], many[13])


def test_default_conditions_sample_all_classes_without_captions(model: DiffusionModel) -> None:
    plain = sample(model, range(8), 7, SAMPLING)
    assert torch.equal(sample(model, range(8), 7, SAMPLING.model_copy(update={"guidance": 1.0})), plain)
    numbers = make_conditioning(model, range(300), 7)["label"].tolist()
    assert [model.classes[number] for number in numbers] == label_names(model, range(300), 7)
    assert min(Counter(numbers).values()) > 70
    assert not make_conditioning(model, range(300), 7)["text"].any()


def test_labels_and_prompts_cycle_over_the_image_indices(model: DiffusionModel) -> None:
    assert label_names(model, range(4), 0, CONDITIONS) == ["red", None, "blue", "red"]
    assert label_names(model, [7, 0], 0, Conditions(prompts=("a",))) == [None, None]
    assert [CONDITIONS.prompt(index) for index in (0, 2, 5)] == ["red square", None, "blue square"]


def test_labels_prompts_and_negative_prompt_change_the_image(model: DiffusionModel) -> None:
    images = [
        sample(model, range(8), 7, GUIDED, conditions=conditions).numpy().tobytes()
        for conditions in (
            Conditions(labels=("red",)),
            Conditions(labels=("blue",)),
            Conditions(prompts=("red square",)),
            Conditions(prompts=("blue square",)),
            Conditions(prompts=("red square",), negative_prompt="blue square"),
            Conditions(labels=("red",), prompts=("red square",)),
        )
    ]
    assert len(set(images)) == len(images)


PLAIN = sampling_config()
THREE = sampling_config(guidance=3)


@pytest.mark.parametrize(
    ("classes", "text", "config", "conditions", "words"),
    [
        (["cat", "dog"], False, PLAIN, Conditions(labels=("bird",)), "knows no class 'bird': use one of cat, dog"),
        ([], True, PLAIN, Conditions(labels=("cat",)), "trained without classes"),
        (["cat"], False, PLAIN, Conditions(prompts=("a cat",)), r"trained without captions.*model\.text=true"),
        ([], True, PLAIN, Conditions(prompts=("a",), negative_prompt="b"), "what sampling.guidance leads away from"),
        (
            [],
            True,
            sampling_config(guidance=1),
            Conditions(negative_prompt="b"),
            "what sampling.guidance leads away from",
        ),
        ([], True, THREE, Conditions(), r"sampling\.guidance = 3 .* there is none: give a prompt, or leave it out"),
        ([], False, THREE, Conditions(), "trained without classes and captions, leave it out"),
        (["cat"], True, THREE, Conditions(labels=(None,)), "there is none"),
    ],
)
def test_conditions_without_effect_are_an_error(
    classes: list[str], text: bool, config: SamplingConfig, conditions: Conditions, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_conditions(classes, text, config, conditions)


@pytest.mark.parametrize(
    ("classes", "text", "config", "conditions"),
    [
        ([], False, PLAIN, Conditions()),
        (["cat"], False, THREE, Conditions()),
        (["cat"], True, THREE, Conditions()),
        ([], True, THREE, Conditions(negative_prompt="b")),
        ([], True, THREE, Conditions(prompts=("a", None))),
        (["cat"], True, PLAIN, Conditions(labels=("cat", None), prompts=("a",))),
    ],
)
def test_conditions_with_an_effect_are_accepted(
    classes: list[str], text: bool, config: SamplingConfig, conditions: Conditions
) -> None:
    check_conditions(classes, text, config, conditions)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"guidance_rescale": 0.7},
            "sampling.guidance_rescale means nothing to sampling.guidance = null: set sampling.guidance",
        ),
        ({"guidance": 1, "guidance_interval": (1, 2)}, "means nothing to sampling.guidance = 1"),
        ({"guidance": 3, "guidance_interval": (2, 1)}, "rises from a σ of 0 or more"),
        ({"guidance": -1}, "greater than or equal to 0"),
        ({"guidance": 3, "guidance_rescale": 1.5}, "less than or equal to 1"),
    ],
)
def test_contradicting_settings_are_an_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SAMPLING_ADAPTER.validate_python(settings)


def test_guidance_without_conditioning_fails_before_training(dataset: Path, tmp_path: Path) -> None:
    untold = SHAPE.model_copy(update={"conditional": False})
    with pytest.raises(UserError, match="trained without classes and captions"):
        run(dataset, tmp_path / "run", untold, sampling=GUIDED)
    assert not list(tmp_path.glob("run/checkpoints/*"))


@needs_encoder
def test_a_prompt_too_long_to_be_read_is_rejected() -> None:
    check_prompts(Conditions(prompts=("word " * 254, None)))
    with pytest.raises(UserError, match="has 302 word pieces, and 256 are read: shorten it"):
        check_prompts(Conditions(prompts=("word " * 300,)))
    with pytest.raises(UserError, match="is no Unicode text: write it again"):
        check_prompts(Conditions(prompts=("half a character: \ud800",)))
    # A space that has no width.
    with pytest.raises(UserError, match="a prompt needs words"):
        check_prompts(Conditions(prompts=("\u200b",)))
    with pytest.raises(UserError, match="a prompt needs words"):
        check_prompts(Conditions(prompts=(" ",)))


@pytest.mark.slow
@needs_encoder
def test_captions_too_long_do_not_prevent_training(tmp_path: Path) -> None:
    captions = ["word " * number for number in range(290, 298)]
    write_dataset(tmp_path / "long", random_images(8, channels=3), 8, captions=captions)
    assert run(tmp_path / "long", tmp_path / "run").images == CONFIG.images


@pytest.mark.slow
@needs_encoder
def test_images_follow_the_colour_of_the_prompt(tmp_path: Path) -> None:
    squares(tmp_path / "squares")
    settings = {
        "images": 2400,
        "learning_rate": 1e-2,
        "checkpoints": 1,
        "weighting": "plain",
        "timestep_sampling": "uniform",
    }
    config = CONFIG.model_copy(update=settings)
    shapes = [each.model_copy(update={"schedule": "cosine", "prediction": "v_prediction"}) for each in (MODEL, SHAPE)]
    caption_model, plain_model = (
        load_model(train(tmp_path / "squares", tmp_path / f"run{number}", each, config, SAMPLING).final)
        for number, each in enumerate(shapes)
    )
    names = list(COLOURS)
    for words in ("{} square", "a square that is {}"):
        conditions = Conditions(prompts=tuple(words.format(name) for name in names))
        colours_of_images = colours(sample(caption_model, range(36), 0, SAMPLING, conditions=conditions))
        assert sum(one == other for one, other in zip(colours_of_images, names * 12, strict=True)) >= 34
    # So small an image has its colour from the first step on: it begins where nothing of it is left.
    away = SAMPLING.model_copy(update={"guidance": 3.0, "sigma_max": 40.0, "steps": 6})
    colours_of_images = colours(
        sample(caption_model, range(24), 0, away, conditions=Conditions(negative_prompt="red square"))
    )
    assert colours_of_images.count("red") <= 2  # of 8 without
    # Trained in the same way on the same images, but unconditional, it takes no prompt and generates all colours.
    assert max(Counter(colours(sample(plain_model, range(36), 0, SAMPLING))).values()) < 30
    with pytest.raises(UserError, match="trained without captions"):
        sample(plain_model, range(36), 0, SAMPLING, conditions=Conditions(prompts=("red square",)))


def test_evaluation_uses_the_conditions_of_held_out_images(model: DiffusionModel, data: Path, tmp_path: Path) -> None:
    evaluator = Evaluator(data, EvaluationConfig(samples=10), SAMPLING, tmp_path / "report")
    conditions, dataset = evaluator.model(tmp_path / "run" / "final.safetensors").conditions, Dataset.open(data)
    held_out = dataset.rows("held_out")
    captions = [caption for caption in dataset.captions(held_out) if caption]
    assert conditions.prompts == tuple(captions[:10])
    assert [f"{label} square" for label in conditions.labels] == captions[:10]
    untold = write_model(tmp_path / "untold.safetensors", 0, 1, channels=3)
    assert evaluator.model(untold).conditions == Conditions()
