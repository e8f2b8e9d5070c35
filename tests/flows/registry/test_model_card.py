"""The model card: everything a version is made of, in Markdown that MLflow shows, written for each verdict once."""

import re
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.evaluation.comparison import ChampionComparison, compare_with_champion
from diffusion.evaluation.estimate import Interval, MetricEstimate
from diffusion.evaluation.gate import Finding, GateConfig
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement
from diffusion.evaluation.reports.html import format_interval, format_signed, format_with_error
from diffusion.evaluation.results import GuidanceChoice, GuidanceScore
from diffusion.process.samplers import SamplingConfig
from flows.registry import model_card
from flows.registry.ledger import Evidence, History
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import mark
from tests.builders.comparisons import CONFIG, SAMPLING, discs
from tests.builders.evaluations import an_evaluation
from tests.builders.model_cards import rows, section
from tests.builders.model_versions import add_version
from tests.builders.removals import REMOVAL
from tests.builders.small_models import header, write_model

VERSION = Version(
    model="faces",
    number=3,
    run_id="0123456789abcdef",
    weights_sha256="b" * 64,
    tags={"darkroom.dvc_digest": "abc.dir", "darkroom.git_commit": "c0ffee, with changes that were not committed"},
)
EVIDENCE = Evidence(verdict="promote", reason="first | version:\nno champion", figures={"kid": 0.01}, eval_key="e" * 64)
ENTRY = History("faces").next_entry("promote", 3, "b" * 64, evidence=EVIDENCE)
HEADER = header()


@pytest.fixture
def data(dataset: Path) -> Manifest:
    return read_manifest(dataset)


def test_model_card_has_origin_metrics_and_evaluation_settings(data: Manifest) -> None:
    evaluation = an_evaluation([0.05, 0.02])
    card = model_card.card(HEADER, evaluation, data, VERSION, ENTRY)
    assert card.startswith("# faces, version 3\n")
    about = rows(card, "Data")
    assert about["content"] == [f"`{data.content_digest}`"]
    assert about["version"] == [f"`{data.digest}`"]
    assert about["DVC"] == ["`abc.dir`"]
    assert about["classes"] == ["even (24), odd (24)"]
    assert about["licence"][0].startswith("unknown: set ingest.licence")
    training = rows(card, "Training")
    assert training["images seen"] == ["2,000"]
    assert training["code"] == ["git c0ffee, with changes that were not committed"]
    figures = rows(card, "How good it is")
    assert figures["kid_efflite0"] == ["0.020 ± 0.020", "0.0100"]
    assert figures["recall_efflite0"] == ["0.745", "0.745"]
    assert "kid_se_efflite0" not in figures
    cells = rows(card, "Gate decision")
    assert cells["outcome"] == ["champion"]
    assert cells["why"] == ["first ¦ version: no champion"]
    assert cells["ledger"] == [f"entry 1, `{ENTRY.digest}`"]
    assert "evaluation/grids/0000002000-11111111.png" in section(card, "Samples")
    calls = section(card, "How to call it")
    assert "darkroom sample --model models:/faces/3" in calls
    assert 'mlflow.pyfunc.load_model("models:/faces/3")' in calls
    assert "mlflow models serve -m models:/faces/3" in calls
    assert evaluation.eval_key in section(card, "Limits")
    assert model_card.card(HEADER, evaluation, data, VERSION, ENTRY) == card


def test_model_card_notes_missing_verdict_and_small_classes(data: Manifest) -> None:
    few = data.parts[0].model_copy(update={"classes": {"even": 40, "odd": 2}})
    data = data.model_copy(update={"parts": [few]})
    card = model_card.card(HEADER, an_evaluation([0.05]), data, VERSION, None)
    assert section(card, "Gate decision").startswith("Not yet")
    assert "Of class odd it saw 2 images" in section(card, "Limits")


@pytest.mark.slow
def test_model_card_shows_intervals_and_limits_of_the_comparison(tmp_path: Path) -> None:
    folder = discs(tmp_path / "discs")
    classes = {"left": 60, "right": 60}
    new, old = (write_model(tmp_path / f"{n}.safetensors", n, n, classes=classes) for n in (1, 2))
    config = CONFIG.model_copy(update={"samples": 64})
    comparison, _ = compare_with_champion(new, old, folder, config, SAMPLING, GateConfig(), tmp_path / "reports")
    card = model_card.card(HEADER, an_evaluation([0.05]), read_manifest(folder), VERSION, ENTRY, comparison)
    figures = rows(card, "How good it is")
    measured = comparison.candidate.estimates["kid_efflite0"]
    assert figures["kid_efflite0"] == [
        format_with_error(measured.value, measured.error),
        format_interval(measured.interval),
        format_signed(comparison.champion.estimates["kid_efflite0"].value),
        format_signed(comparison.real_baseline.estimates["kid_efflite0"].value),
    ]
    assert {"copies_share", "duplicates_share", "bits_per_dim", "gflop_per_image"} <= figures.keys()
    cells = rows(card, "Gate decision", 1)
    assert cells["headline"] == [finding_of(comparison, "headline").verdict, finding_of(comparison, "headline").reason]
    assert cells.keys() == {"headline", "memorized", "recall", "cost"}
    # The beginning and the table give the same figure: that of the comparison.
    match = re.search(r"^KID ([−0-9.]+) \[", card, re.MULTILINE)
    kid = comparison.candidate.estimates["kid_efflite0"].value
    assert float(match[1].replace("−", "-")) == pytest.approx(kid, abs=0.006)
    assert comparison.candidate.scores.kid == pytest.approx(kid)
    limits = section(card, "Limits")
    # Card, gate and ledger say the same of copies.
    words = comparison.candidate.memorization.summary
    assert words[1:] in limits
    assert words in finding_of(comparison, "memorized").reason
    assert f"Its worst class is {comparison.candidate.per_class.worst.name}: KID " in limits
    # Noise instead of discs.
    assert re.search(r"Its images have (more|less) contrast than real ones, by \d", limits)


@pytest.mark.parametrize("measured", [True, False])
def test_card_of_a_text_model_has_its_text_image_agreement(measured: bool, data: Manifest) -> None:
    estimates = (
        MetricEstimate(value=value, error=0.01, interval=Interval(low=value - 0.02, high=value + 0.02, confidence=0.95))
        for value in (0.31, 0.12, 0.34)
    )
    names = ("agreement", "above_chance", "real")
    figures = dict(zip(names, estimates, strict=True))
    agreement = TextImageAgreement(encoder="clip_1a2b3c4d", images=500, captions=90, shuffled=0.19, **figures)
    evaluation = an_evaluation([0.05])
    best = evaluation.best.model_copy(update={"text_image_agreement": agreement if measured else "set OPTION"})
    card = model_card.card(HEADER, evaluation.model_copy(update={"best": best}), data, VERSION, None)
    text = section(card, "How good it is")
    assert ("text_image_agreement_clip_1a2b3c4d" in rows(card, "How good it is")) == measured
    words = ["0.310 [0.290, 0.330]", "real images 0.340", "others 0.190"] if measured else ["not measured: set OPTION"]
    assert all(each in text for each in words)


def finding_of(comparison: ChampionComparison, rule: str) -> Finding:
    return next(each for each in comparison.decision.findings if each.rule == rule)


def test_the_licence_of_the_data_changes_no_content(images: Path, tmp_path: Path) -> None:
    folder, plain = tmp_path / "data" / "faces", tmp_path / "data" / "plain"
    config = IngestConfig(source=str(images), size=8, held_out=0.33)
    licensed = config.model_copy(update={"licence": "CC-BY-4.0"})
    unlicensed = ingest(plain, config)
    assert b"licence" not in (plain / "manifest.json").read_bytes()
    first = ingest(folder, licensed)
    assert first.content_digest == unlicensed.content_digest
    assert not ingest(folder, config).changed
    assert read_manifest(folder).licence == "CC-BY-4.0"
    new_result = ingest(folder, config.model_copy(update={"licence": "CC0-1.0"}))
    assert (new_result.changed, new_result.added, new_result.content_digest) == (True, 0, first.content_digest)
    card = model_card.card(HEADER, an_evaluation([0.05]), read_manifest(folder), VERSION, ENTRY)
    assert rows(card, "Data")["licence"] == ["CC0-1.0"]


def test_model_card_is_written_per_verdict_and_keeps_takedowns(
    mlflow_client: MlflowClient, dataset: Path, tmp_path: Path
) -> None:
    version, data = add_version(mlflow_client, tmp_path, "carded"), read_manifest(dataset)
    uri, evaluation = version.uri, an_evaluation([0.05])

    def write(entries: History) -> str:
        model_card.write(mlflow_client, HEADER, evaluation, data, version, entries.find_newest_entry(1))
        return mlflow_client.get_model_version("carded", "1").description or ""

    assert "Not yet" in write(History("carded"))
    mark([], [uri], REMOVAL)
    one = History("carded").next_entry("promote", 1, version.weights_sha256, evidence=EVIDENCE)
    card = write(History("carded", (one,)))
    assert "Not yet" not in card
    assert f"{uri} was made from images that were taken down since (takedown {REMOVAL.name})" in card
    assert card.count(f"Takedown {REMOVAL.name}: made from images") == 1

    mlflow_client.update_model_version("carded", "1", description=f"{card}\n\nLooks best in print.")
    assert write(History("carded", (one,))).endswith("Looks best in print.")
    two = History("carded", (one,)).next_entry("reject", 1, version.weights_sha256, evidence=EVIDENCE)
    card = write(History("carded", (one, two)))
    assert two.digest in card
    assert card.count(f"Takedown {REMOVAL.name}: made from images") == 1


def chosen_guidance(sampling: SamplingConfig) -> GuidanceChoice:
    score = GuidanceScore(sampling=sampling, images=500, kid=0.1, verdict="chosen")
    return GuidanceChoice(scores=[score], confidence=0.95, max_recall_loss=0.1)


def test_model_card_names_the_guidance_that_evaluation_chose(data: Manifest) -> None:
    evaluation = an_evaluation([0.02])
    assert "guidance" not in model_card.card(HEADER, evaluation, data, VERSION, ENTRY)
    sampling = evaluation.conditions.sampling.with_changes({"guidance": 2, "guidance_interval": (0.2, 5)})
    chosen = chosen_guidance(sampling)
    card = model_card.card(HEADER, evaluation.model_copy(update={"guidance": chosen}), data, VERSION, ENTRY)
    assert "guidance 2 at σ from 0.2 to 5" in section(card, "How to call it")
    sampling = evaluation.conditions.sampling.with_changes({"autoguidance": 2})
    chosen = chosen_guidance(sampling)
    card = model_card.card(HEADER, evaluation.model_copy(update={"guidance": chosen}), data, VERSION, ENTRY)
    assert "guidance 2 by autoguidance" in section(card, "How to call it")
