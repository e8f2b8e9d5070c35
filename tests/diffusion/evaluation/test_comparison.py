"""The trial: who is promoted, held and rejected beside whom, on the same images, and with which figures."""

import json
from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.evaluation.comparison import ChampionComparison, compare_with_champion
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.gate import GateConfig, GateVerdict
from diffusion.generation.generate import labels_of, sample
from diffusion.process.samplers import sampling_config
from tests.builders import NO_BARS
from tests.builders.comparisons import (
    COMPARISON_CONFIG,
    CONFIG,
    GATE,
    SAMPLING,
    Watcher,
    compare_models,
    good,
    noisy,
    save_images,
    training_images,
    write_autoencoder,
)
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import CONFIG as MODEL
from tests.builders.small_models import write_model

OPEN_GATE = GATE.model_copy(update=NO_BARS)
CONFIDENCES = {1: [0.95], 2: [0.9912, 0.9533], 3: [0.9996, 0.9912, 0.9534]}


def test_a_better_model_is_promoted_and_a_worse_rejected(data: Path, models: list[Path], tmp_path: Path) -> None:
    new, old = models
    save_images(new, noisy(good(48), 5), data, tmp_path, COMPARISON_CONFIG)
    save_images(old, noisy(good(48, first=6000), 60), data, tmp_path, COMPARISON_CONFIG)
    comparison, grids = compare_models(new, old, data, tmp_path)
    assert comparison.decision.verdict == GateVerdict.promote
    assert "better by more than δ: kid_efflite0" in comparison.reason
    assert "on 48 generated images and 40 held-out" in comparison.reason
    assert "copies of training images" in comparison.reason
    assert "an image costs" in comparison.reason
    assert comparison.champion is not None
    headline = comparison.compared.headline
    assert headline is not None
    candidate, champion = comparison.candidate.estimates["kid_efflite0"], comparison.champion.estimates["kid_efflite0"]
    assert headline.difference.value == pytest.approx(candidate.value - champion.value)
    assert candidate.interval.low < candidate.value < candidate.interval.high < champion.interval.low
    assert torch.equal(grids.candidate, noisy(good(48), 5))
    metrics = comparison.metrics()
    assert metrics["kid_efflite0_low"] == candidate.interval.low
    assert metrics["champion_kid_efflite0"] == headline.champion.value
    assert metrics["real_baseline_kid_efflite0"] == headline.real_baseline

    reverse, _ = compare_models(old, new, data, tmp_path)
    assert reverse.decision.verdict == GateVerdict.reject
    assert reverse.reason.startswith("worse than the champion: kid_efflite0")


@pytest.mark.parametrize(
    ("deviation", "looks", "count", "verdict"),
    [
        (37, 1, 48, "hold"),
        pytest.param(38, 2, 96, "hold", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(38, 3, 192, "hold", marks=pytest.mark.slow),
        pytest.param(37, 2, 96, "promote", marks=[pytest.mark.slow, pytest.mark.long]),
        (32, 3, 96, "promote"),
    ],
)
def test_an_undecided_comparison_doubles_its_images_each_look(
    deviation: float, looks: int, count: int, verdict: str, data: Path, models: list[Path], tmp_path: Path
) -> None:
    new, old = models
    for samples in (48, 96, 192):
        config = COMPARISON_CONFIG.model_copy(update={"samples": samples})
        save_images(new, noisy(good(192), deviation)[:samples], data, tmp_path, config)
        save_images(old, noisy(good(192, first=6000), 40)[:samples], data, tmp_path, config)
    gate = GATE.model_copy(update={"looks": looks, "delta": 0})
    comparison, _ = compare_models(new, old, data, tmp_path, gate)
    assert (comparison.compared.samples, comparison.decision.verdict) == (count, verdict)
    assert comparison.look == count.bit_length() - (48).bit_length() + 1
    assert f"with confidence {comparison.confidence:.4g} and at most" in comparison.reason
    # O'Brien and Fleming's, of looks at twice the images each.
    assert comparison.confidence == pytest.approx(CONFIDENCES[looks][comparison.look - 1], abs=1e-4)
    # As many real images in the place of generated ones, or all there are.
    assert comparison.real_baseline.scores.samples == min(count, len(Dataset.open(data).rows("train")))


def test_more_images_reuse_whole_batches_generated_before(data: Path, models: list[Path], tmp_path: Path) -> None:
    sampling, watcher = SAMPLING.model_copy(update={"compute_batch": 32}), Watcher()
    evaluator = Evaluator(data, CONFIG, sampling, tmp_path, watcher)
    fewer, more = (evaluator.model(models[0], count).images for count in (48, 96))
    assert torch.equal(more, sample(load_model(models[0]), range(96), CONFIG.seed, sampling))
    assert torch.equal(more[:32], fewer[:32])
    assert [done for what, done in watcher.calls if what == "new: images sampled"] == [32, 48, 96]


def test_the_gate_shares_what_chose_no_checkpoint_and_nothing_else(
    data: Path, models: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(data, models, CONFIG, SAMPLING, tmp_path, cache=tmp_path / "evaluations")
    best, other = sorted(models, key=lambda path: str(path) != evaluation.best.file)
    first = evaluation.choosing_samples
    assert first == 16
    watcher = Watcher()
    comparison, grids = compare_with_champion(
        best, other, data, CONFIG, SAMPLING, GATE, tmp_path, watcher, evaluation.choosing_samples
    )
    numbers = range(first, first + CONFIG.samples)
    for path, images in ((best, grids.candidate), (other, grids.champion)):
        assert torch.equal(images, sample(load_model(path), numbers, CONFIG.seed, SAMPLING))
    # 48 were evaluated of the best one, of which 32 chose nothing; of the other one those that chose.
    assert [watcher.seen.count(f"{name}: images sampled") for name in ("candidate", "champion")] == [1, 3]
    assert (comparison.conditions.first, comparison.conditions.evaluation.seed) == (first, CONFIG.seed)
    assert comparison.key != evaluation.eval_key


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_a_model_is_not_promoted_over_itself(delta: float, data: Path, models: list[Path], tmp_path: Path) -> None:
    comparison, _ = compare_models(models[0], models[0], data, tmp_path, GateConfig(delta=delta))
    assert comparison.decision.verdict == GateVerdict.hold
    headline = comparison.compared.headline
    assert headline is not None
    assert (headline.difference.value, headline.difference.error) == (0, 0)


@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_copies_training_images_is_rejected(
    first: bool, data: Path, models: list[Path], tmp_path: Path
) -> None:
    new, old = models
    copies = torch.cat([training_images(data, 12), good(36)])
    save_images(new, copies, data, tmp_path, COMPARISON_CONFIG)
    comparison, grids = compare_models(new, None if first else old, data, tmp_path)
    assert comparison.decision.verdict == GateVerdict.reject
    assert "copies of training images: " in comparison.reason
    copy_flags = [each.is_copy for each in comparison.candidate.memorization.pairs]
    assert sum(copy_flags) >= 12
    assert torch.equal(grids.nearest_generated[:8], grids.nearest_training[:8])


def test_a_first_version_needs_no_champion_and_has_its_intervals(
    data: Path, models: list[Path], tmp_path: Path
) -> None:
    comparison, grids = compare_models(models[0], None, data, tmp_path, OPEN_GATE)
    assert comparison.decision.verdict == GateVerdict.promote
    assert comparison.decision.reasons[0] == "first version: there was no champion"
    assert comparison.compared.own.keys() == {"precision", "recall", "coverage"}
    assert {each.rule for each in comparison.decision.findings} == {"headline", "memorized"}
    assert (comparison.champion, grids.champion) == (None, None)
    assert {
        "fd_efflite0",
        "kid_efflite0",
        "recall_efflite0",
        "coverage_efflite0",
    } <= comparison.candidate.estimates.keys()
    seed = CONFIG.seed + 1
    expected = sample(load_model(models[0]), range(CONFIG.samples), seed, SAMPLING)
    assert torch.equal(grids.candidate, expected)
    assert comparison.conditions.evaluation.seed == seed


def test_a_first_version_of_noise_is_held_good_images_promoted(data: Path, models: list[Path], tmp_path: Path) -> None:
    noise, understood = models
    save_images(noise, torch.from_numpy(random_images(48)), data, tmp_path, COMPARISON_CONFIG)
    save_images(understood, good(48), data, tmp_path, COMPARISON_CONFIG)
    assert compare_models(noise, None, data, tmp_path)[0].decision.verdict == GateVerdict.hold
    assert compare_models(understood, None, data, tmp_path)[0].decision.verdict == GateVerdict.promote


def test_stored_comparison_equals_the_returned_one(data: Path, models: list[Path], tmp_path: Path) -> None:
    comparison, _ = compare_models(*models, data, tmp_path)
    file_bytes = (tmp_path / "champion_comparison.json").read_bytes()
    assert ChampionComparison.model_validate_json(file_bytes) == comparison
    assert json.loads(file_bytes)["gate"] == GATE.model_dump()


@pytest.mark.slow
def test_images_are_reused_when_the_candidate_becomes_champion(data: Path, models: list[Path], tmp_path: Path) -> None:
    new, old = models
    watcher = Watcher()
    first, _ = compare_models(new, old, data, tmp_path, progress=watcher)
    assert watcher.sampled_models == {"candidate", "champion"}
    watcher = Watcher()
    assert compare_models(new, old, data, tmp_path, progress=watcher)[0] == first
    assert watcher.seen == []
    newest = write_model(tmp_path / "newest.safetensors", 3, 3)
    champion = tmp_path / "as-registered.safetensors"
    champion.write_bytes(new.read_bytes())
    watcher = Watcher()
    next_one, _ = compare_models(newest, champion, data, tmp_path, progress=watcher)
    assert watcher.sampled_models == {"candidate"}
    assert next_one.champion is not None
    assert next_one.champion == first.candidate
    watcher = Watcher()
    more_steps = SAMPLING.model_copy(update={"steps": 5})
    other, _ = compare_models(newest, champion, data, tmp_path, sampling=more_steps, progress=watcher)
    assert watcher.sampled_models == {"candidate", "champion"}
    assert other.key != next_one.key


@pytest.mark.slow
def test_interrupted_comparison_resumes_to_the_same_bytes(data: Path, models: list[Path], tmp_path: Path) -> None:
    compare_models(*models, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compare_models(*models, data, tmp_path / "cut", progress=Watcher("champion: images sampled"))
    assert not (tmp_path / "cut" / "champion_comparison.json").exists()
    watcher = Watcher()
    compare_models(*models, data, tmp_path / "cut", progress=watcher)
    assert watcher.sampled_models == {"champion"}
    assert (tmp_path / "cut" / "champion_comparison.json").read_bytes() == (
        tmp_path / "whole" / "champion_comparison.json"
    ).read_bytes()


def test_interrupted_sampling_resumes_after_the_last_complete_chunk(
    data: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.evaluation.model_evaluator.cores", lambda: 1)
    small = SAMPLING.model_copy(update={"compute_batch": 8})  # 16 images to a piece
    compare_models(models[0], None, data, tmp_path / "whole", sampling=small)
    watcher = Watcher("candidate: images sampled", 2 * 16 + 8)
    with pytest.raises(KeyboardInterrupt):
        compare_models(models[0], None, data, tmp_path / "cut", sampling=small, progress=watcher)
    [pieces] = (tmp_path / "cut" / "evaluations").glob("*.pieces")
    assert len(list(pieces.glob("*.sha256"))) == 2
    watcher = Watcher()
    compare_models(models[0], None, data, tmp_path / "cut", sampling=small, progress=watcher)
    assert [done for what, done in watcher.calls if what == "candidate: images sampled"] == [40, 48]
    assert (tmp_path / "cut" / "champion_comparison.json").read_bytes() == (
        tmp_path / "whole" / "champion_comparison.json"
    ).read_bytes()
    assert not list(tmp_path.rglob("*.pieces"))


def test_grids_show_the_worst_classes_and_duplicate_images(data: Path, tmp_path: Path) -> None:
    classes = {"left": 60, "right": 60}
    path = write_model(tmp_path / "conditional.safetensors", 1, 1, classes=classes)
    config = CONFIG.model_copy(update={"samples": 64})
    again = good(64)
    again[10:14] = again[10].clone()
    save_images(path, again, data, tmp_path, config.model_copy(update={"seed": CONFIG.seed + 1}))
    comparison, grids = compare_models(path, None, data, tmp_path, config=config)
    per_class, doubles = comparison.candidate.per_class, comparison.candidate.duplicates
    assert per_class is not None
    assert list(grids.classes) == [each.name for each in per_class.worst_first]
    dataset = Dataset.open(data)
    held_out = dataset.rows("held_out")
    labels = labels_of(load_model(path), range(64), CONFIG.seed + 1)
    assert labels is not None
    for name, (real, generated) in grids.classes.items():
        number = sorted(classes).index(name)
        of_class = (dataset.classes(held_out, sorted(classes)) == number).numpy()
        assert torch.equal(real, dataset.images(held_out[of_class][:8]))
        assert torch.equal(generated, again[labels == number][:8])
    assert any({10, 11, 12, 13} <= set(group.members) for group in doubles.groups)
    for group, sheet in zip(doubles.groups, grids.duplicates, strict=True):
        assert torch.equal(sheet, again[group.members])


def test_autoencoders_are_compared_by_held_out_reconstructions(data: Path, tmp_path: Path) -> None:
    paths = [write_autoencoder(tmp_path / f"{spread}.safetensors", 1, spread) for spread in (0.02, 0.5)]
    sampling = sampling_config(compute_batch=16, precision="fp32")
    verdicts = {}
    for candidate, champion in (paths, paths[::-1]):
        comparison, _ = compare_models(candidate, champion, data, tmp_path, sampling=sampling)
        headline = comparison.compared.headline
        assert headline is not None
        assert headline.name == "reconstruction_psnr"
        assert [each.rule for each in comparison.decision.findings] == ["headline"]
        assert "on 40 held-out images" in comparison.reason
        verdicts[headline.lead.value > 0] = comparison.decision.verdict
    assert verdicts == {True: "promote", False: "reject"}


def test_models_that_enlarge_are_compared_on_the_same_small_images(data: Path, tmp_path: Path) -> None:
    config = MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    new, old = (write_model(tmp_path / f"{seed}.safetensors", seed, seed, config=config) for seed in (1, 2))
    comparison, grids = compare_models(new, old, data, tmp_path)
    assert (comparison.compared.samples, comparison.compared.reference) == (20, 20)
    assert comparison.conditions.low_resolution == 4
    assert comparison.candidate.similarity is not None
    assert len(grids.real) == len(grids.candidate) == 20


def test_too_few_images_hold_only_a_later_candidate(models: list[Path], tmp_path: Path) -> None:
    few = tmp_path / "data" / "few"
    write_dataset(few, random_images(44), per_shard=44)
    comparison, _ = compare_models(*models, few, tmp_path)
    assert comparison.decision.verdict == GateVerdict.hold
    assert "too few images to tell the two apart: 48 generated and 11 held out, and errors need 12" in comparison.reason
    assert comparison.candidate.estimates == {}
    assert compare_models(models[0], None, few, tmp_path)[0].decision.verdict != GateVerdict.reject
