"""What two models must share to be compared, and how each is sampled."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoints import export, load_model
from diffusion.common.errors import UserError
from diffusion.evaluation.comparison import ChampionComparison
from diffusion.evaluation.gate import GateVerdict
from diffusion.families.config import AutoregressiveConfig, FamilyConfig, GANConfig, VAEConfig
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config
from tests.builders.captioned import squares
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
    write_autoencoder,
    write_of_family,
)
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import CONFIG as MODEL
from tests.builders.small_models import write_model


def plain(path: Path, **changes: object) -> Path:
    return write_model(path, 5, 1, **changes)  # type: ignore[arg-type]


def test_incomparable_champion_holds_the_candidate_with_a_reason(
    data: Path, models: list[Path], tmp_path: Path
) -> None:
    small = MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    champions = {
        "it is a vae and the candidate a ddpm": write_autoencoder(tmp_path / "vae.safetensors", 0),
        "generates images of 3×16×16": plain(tmp_path / "rgb.safetensors", channels=3, size=16),
        "enlarges from 4 pixels, and what it would be compared with generates from noise": plain(
            tmp_path / "sr.safetensors", config=small
        ),
    }
    for words, champion in champions.items():
        comparison, _ = compare_models(models[0], champion, data, tmp_path)
        assert comparison.decision.verdict == GateVerdict.hold
        assert comparison.reason.startswith("the champion cannot be evaluated beside it: ")
        assert words in comparison.reason
        assert {each.rule for each in comparison.decision.findings} == {"headline", "memorized"}


@pytest.mark.slow
def test_champion_without_classes_is_sampled_without_guidance(data: Path, tmp_path: Path) -> None:
    class_model = write_model(tmp_path / "conditional.safetensors", 0, 1, classes={"left": 60, "right": 60})
    unconditional_model = write_model(tmp_path / "untold.safetensors", 0, 1)
    sampling = SAMPLING.model_copy(update={"guidance": 2.0})
    comparison, grids = compare_models(class_model, unconditional_model, data, tmp_path, sampling=sampling)
    assert comparison.champion is not None
    assert grids.champion is not None
    images = sample(load_model(unconditional_model), range(CONFIG.samples), CONFIG.seed + 1, SAMPLING)
    assert torch.equal(grids.champion, images)
    assert comparison.candidate.gflop == pytest.approx(2 * comparison.champion.gflop, rel=0.02)


@pytest.mark.slow
def test_champion_without_a_guide_is_sampled_without_autoguidance(data: Path, tmp_path: Path) -> None:
    candidate = write_model(tmp_path / "candidate.safetensors", 0, 1, guide=2)
    champion = write_model(tmp_path / "champion.safetensors", 1, 1)
    comparison, grids = compare_models(
        candidate, champion, data, tmp_path, sampling=SAMPLING.with_changes({"autoguidance": 2})
    )
    assert comparison.champion is not None
    assert grids.champion is not None
    generated = sample(load_model(champion), range(CONFIG.samples), CONFIG.seed + 1, SAMPLING)
    assert torch.equal(grids.champion, generated)
    assert "2 by autoguidance" in conditions(comparison)
    assert comparison.candidate.gflop == pytest.approx(2 * comparison.champion.gflop, rel=0.02)


def knowing(path: Path, seed: int, *classes: str, text: bool = False) -> Path:
    config = MODEL.model_copy(update={"text": text})
    return write_model(path / f"{seed}.safetensors", seed, seed, 3, config=config, classes=dict.fromkeys(classes, 40))


@pytest.fixture(scope="module")
def captioned_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "squares"
    squares(folder, 160, labelled=True)
    return folder


def conditions(comparison: ChampionComparison) -> str:
    """What the comparison says of unlike conditions."""
    [finding] = [each for each in comparison.decision.findings if each.rule == "conditions"]
    assert finding.verdict == "promote"
    return finding.reason


@pytest.mark.slow
@pytest.mark.usefixtures("fake_encoder")
@pytest.mark.parametrize("others", [(), ("red", "green", "blue")])
def test_a_model_of_captions_needs_a_champion_of_captions(
    others: tuple[str, ...], captioned_data: Path, tmp_path: Path
) -> None:
    caption_model, other_model = knowing(tmp_path, 1, text=True), knowing(tmp_path, 2, *others)
    for candidate, champion, words in (
        (caption_model, other_model, "the champion knows none"),
        (other_model, caption_model, "the candidate knows none"),
    ):
        watcher = Watcher()
        comparison, grids = compare_models(candidate, champion, captioned_data, tmp_path, progress=watcher)
        assert comparison.decision.verdict == "hold"
        assert words in comparison.reason
        assert (comparison.champion, grids.champion) == (None, None)
        assert watcher.sampled_models <= {"candidate"}


@pytest.mark.slow
@pytest.mark.usefixtures("fake_encoder")
def test_without_captions_in_the_data_models_are_compared_unprompted(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", random_images(160, channels=3), 160)
    comparison, _ = compare_models(knowing(tmp_path, 1, text=True), knowing(tmp_path, 2), tmp_path / "data", tmp_path)
    assert comparison.champion is not None


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_models_with_and_without_classes_are_compared_as_a_whole(
    reverse: bool, captioned_data: Path, tmp_path: Path
) -> None:
    pair = [knowing(tmp_path, 1, "red", "green", "blue"), knowing(tmp_path, 2)]
    comparison, _ = compare_models(*(pair[::-1] if reverse else pair), captioned_data, tmp_path)
    assert comparison.compared.headline is not None
    assert f"only the {'champion' if reverse else 'candidate'} has classes" in conditions(comparison)


@pytest.mark.slow
def test_a_candidate_may_have_more_classes_but_not_fewer(captioned_data: Path, tmp_path: Path) -> None:
    more, fewer = knowing(tmp_path, 1, "red", "green", "blue"), knowing(tmp_path, 2, "red", "green")
    comparison, _ = compare_models(more, fewer, captioned_data, tmp_path)
    assert comparison.compared.headline is not None
    assert "1 class that the champion does not know" in conditions(comparison)
    held_comparison, _ = compare_models(fewer, more, captioned_data, tmp_path)
    assert held_comparison.decision.verdict == "hold"
    assert "1 class that the candidate does not know, 'blue' among them" in held_comparison.reason


FAMILY_CONFIGS = [
    GANConfig(width=8, channel_mult=(1,), latent=4),
    VAEConfig(width=16, channel_mult=(1,), latent_channels=2),
    AutoregressiveConfig(width=8, layers=2, mixtures=2),
]


@pytest.mark.parametrize("config", FAMILY_CONFIGS, ids=lambda config: str(config.family))
@pytest.mark.parametrize("reverse", [False, True])
def test_each_family_is_compared_in_quality_and_operations(
    config: FamilyConfig, reverse: bool, data: Path, tmp_path: Path
) -> None:
    other = write_of_family(tmp_path / "other.safetensors", config, 2)
    pair = [write_model(tmp_path / "ddpm.safetensors", 1, 1), other]
    gate = GATE.model_copy(update={"across_families": True})
    sampling = sampling_config(compute_batch=16, precision="fp32") if reverse else SAMPLING
    comparison, _ = compare_models(*(pair[::-1] if reverse else pair), data, tmp_path, gate, sampling)
    assert comparison.compared.headline is not None
    assert comparison.compared.basis == "generated"
    assert config.family in conditions(comparison)
    cost = comparison.compared.cost
    assert cost is not None
    # Counted by the same means: the other family's is that of one pass of its network.
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = load_model(other)
        [(times, once)] = model.passes(sampling)
        once()
    expected = times * counter.get_total_flops() / 1e9
    assert (cost.candidate if reverse else cost.champion) == pytest.approx(expected)
    assert min(cost.candidate, cost.champion) > 0


def test_models_sampled_unlike_are_compared_with_a_remark(data: Path, tmp_path: Path) -> None:
    student = {"student": {"steps": 1, "guidance": None, "guidance_interval": None}}
    new = write_model(tmp_path / "new.safetensors", 1, 1, training=student)
    comparison, _ = compare_models(new, write_model(tmp_path / "old.safetensors", 2, 2), data, tmp_path)
    reasons = conditions(comparison)
    assert "consistency, 1 steps" in reasons
    assert "dpmpp_2m, 4 steps" in reasons


def test_unevaluable_candidate_is_a_user_error(data: Path, tmp_path: Path) -> None:
    other = plain(tmp_path / "rgb.safetensors", channels=3, size=16)
    with pytest.raises(UserError, match=r"rgb\.safetensors generates images of 3×16×16 and .* holds 1×8×8"):
        compare_models(other, None, data, tmp_path)
    with pytest.raises(UserError, match="no model at"):
        compare_models(tmp_path / "gone.safetensors", None, data, tmp_path)
    few = tmp_path / "data" / "few"
    write_dataset(few, random_images(80), per_shard=80)
    small = plain(
        tmp_path / "sr.safetensors", config=MODEL.model_copy(update={"low_resolution": 4, "conditional": False})
    )
    with pytest.raises(UserError, match=r"few has 20 of 24: hold more out with ingest\.held_out"):
        compare_models(small, None, few, tmp_path)


@pytest.mark.slow
def test_families_are_compared_only_with_across_families(data: Path, tmp_path: Path) -> None:
    # Neither of the two has a reverse process, so that both draw by the same settings.
    plain = sampling_config(compute_batch=16, precision="fp32")
    autoencoder = write_autoencoder(tmp_path / "vae.safetensors", 1)
    gan = write_of_family(tmp_path / "gan.safetensors", GANConfig(width=8, channel_mult=(1,), latent=4), 2)
    gate = GATE.model_copy(update={"across_families": True, "cost": None})
    for path, images in ((gan, noisy(good(48), 5)), (autoencoder, noisy(good(48, first=6000), 60))):
        save_images(path, images, data, tmp_path, COMPARISON_CONFIG, plain)
    held_comparison, _ = compare_models(gan, autoencoder, data, tmp_path, GATE, plain)
    assert held_comparison.decision.verdict == GateVerdict.hold
    assert "only with gate.across_families" in held_comparison.reason
    promoted, _ = compare_models(gan, autoencoder, data, tmp_path, gate, plain)
    assert promoted.decision.verdict == GateVerdict.promote
    assert promoted.compared.basis == "generated"
    rejected_comparison, _ = compare_models(autoencoder, gan, data, tmp_path, gate, plain)
    assert rejected_comparison.decision.verdict == GateVerdict.reject


def test_champion_of_another_family_uses_the_settings_it_supports(data: Path, tmp_path: Path) -> None:
    gan = write_of_family(tmp_path / "gan.safetensors", GANConfig(width=8, channel_mult=(1,), latent=4), 2)
    new = write_model(tmp_path / "new.safetensors", 1, 1)
    gate = GATE.model_copy(update={"across_families": True})
    # To the reverse process of the candidate these settings mean something.
    comparison, _ = compare_models(new, gan, data, tmp_path, gate, SAMPLING)
    assert comparison.champion is not None
    assert comparison.champion.family == "gan"


@pytest.mark.slow
def test_candidate_and_champion_sample_with_their_own_guidance(data: Path, tmp_path: Path) -> None:
    new, old = (write_model(tmp_path / f"{seed}.st", seed, seed, classes={"left": 1, "right": 1}) for seed in (1, 2))
    guided = SAMPLING.with_changes({"guidance": 3, "guidance_interval": (0.2, 5)})
    guided_file = tmp_path / "chosen.safetensors"
    export(new, guided_file, guided)
    expected = {
        guided_file: sample(load_model(new), range(48), COMPARISON_CONFIG.seed, guided),
        old: sample(load_model(old), range(48), COMPARISON_CONFIG.seed, SAMPLING),
    }
    for candidate, champion in ((guided_file, old), (old, guided_file)):
        _, grids = compare_models(candidate, champion, data, tmp_path)
        assert grids.champion is not None
        assert torch.equal(grids.candidate, expected[candidate])
        assert torch.equal(grids.champion, expected[champion])
