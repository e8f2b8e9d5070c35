"""What the flow ``promote`` makes of a trial: words and figures for the ledger, and for the card of the version."""

import json
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from mlflow.artifacts import load_text
from mlflow.client import MlflowClient
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.comparison import ChampionComparison
from diffusion.evaluation.results import GuidanceChoice, GuidanceScore
from flows.config import Params
from flows.promote import GateResult, apply_gate, next_entry, register
from flows.registry import model_card
from flows.registry.ledger import History, Ledger
from flows.registry.model_versions import Version
from tests.builders import NO_BARS
from tests.builders.comparisons import CONFIG, SAMPLING, discs, save_images, training_images
from tests.builders.evaluations import an_evaluation
from tests.builders.model_cards import rows, section
from tests.builders.model_versions import add_version
from tests.builders.shapes import disc
from tests.builders.small_models import header, write_model

COMPARISON_CONFIG = CONFIG.model_copy(update={"seed": CONFIG.seed + 1})


@pytest.fixture
def params(mlflow_client: MlflowClient, bucket: str, tmp_path: Path) -> Params:
    """A data set in the working folder, in a bucket and a registry of its own."""
    discs(tmp_path / "data" / "discs")
    return Params.model_validate(
        {
            "training": {"dataset": "discs"},
            "evaluation": CONFIG.model_dump(),
            "sampling": SAMPLING.model_dump(),
            "gate": {"recall_loss": None, "delta": 0.1, **NO_BARS},
            "registry": {"model": f"discs-{uuid4().hex}"},
        }
    )


class Candidate:
    """A version whose model drew given images, and what the gate says of it."""

    def __init__(self, client: MlflowClient, params: Params, seed: int, images: Tensor) -> None:
        self.client, self.params = client, params
        weights = write_model(params.run_folder / "weights.safetensors", seed, 100 * seed)
        save_images(weights, images, params.dataset_folder, params.report_folder, COMPARISON_CONFIG)
        experiment = client.get_experiment_by_name(params.model_name)
        where = experiment.experiment_id if experiment else client.create_experiment(params.model_name)
        run_id = client.create_run(where).info.run_id
        folder = Path.cwd() / "registry"
        self.version: Version = add_version(client, folder, params.model_name, data=weights.read_bytes(), run_id=run_id)
        self.evaluation = an_evaluation([0.02])

    def decided(self) -> GateResult:
        return apply_gate.fn(self.params, self.evaluation, self.version, self.folder)

    @property
    def folder(self) -> Path:
        """Folder of the report on it."""
        return self.params.model_report_folder(self.version.weights_sha256)

    def committed(self) -> GateResult:
        judgement = self.decided()
        Ledger.of(self.version.model).append(lambda history: next_entry(history, self.version, judgement, None))
        return judgement


def good(count: int, first: int) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(disc(number, 8))[None] for number in range(first, first + count)]))


def spoiled(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("limit", "words"), [(0.2, "no checkpoint in"), (0.1, "run `darkroom evaluate` again")])
def test_a_choice_of_guidance_by_other_limits_is_outdated(params: Params, limit: float, words: str) -> None:
    checkpoint = write_model(params.run_folder / "checkpoints" / "100.safetensors", 1, 100)
    template, content = an_evaluation([0.02]), read_manifest(params.dataset_folder).content_digest
    settings = {"evaluation": params.evaluation, "sampling": params.sampling, "content_digest": content}
    score = GuidanceScore(sampling=params.sampling, images=48, kid=0.1, verdict="chosen")
    evaluation = template.model_copy(
        update={
            "conditions": template.conditions.model_copy(update=settings),
            "best": template.best.model_copy(update={"file": str(checkpoint), "sha256": sha256_file(checkpoint)}),
            "guidance": GuidanceChoice(scores=[score], confidence=params.gate.confidence, max_recall_loss=0.2),
        }
    )
    gate = params.gate.model_copy(update={"recall_loss": limit})
    with pytest.raises(UserError, match=words):
        register.fn(params.model_copy(update={"gate": gate}), evaluation)


@pytest.mark.slow
def test_the_ledger_has_the_figures_and_gate_of_each_verdict(mlflow_client: MlflowClient, params: Params) -> None:
    first = Candidate(mlflow_client, params, 1, spoiled(good(48, 5000), 60)).committed()
    assert (first.champion, first.evidence.verdict) == (None, "promote")
    assert first.evidence.reason.startswith("first version: there was no champion; copies of training images: ")

    second = Candidate(mlflow_client, params, 2, spoiled(good(48, 6000), 5))
    better = second.committed()
    assert (better.champion, better.evidence.verdict) == (1, "promote")
    assert "better by more than δ: kid_efflite0" in better.evidence.reason
    assert better.evidence.gate["delta"] == 0.1
    assert better.evidence.eval_key == better.comparison.key
    figures = better.evidence.figures
    assert figures["kid_efflite0"] < figures["champion_kid_efflite0"]
    assert figures["champion_kid_efflite0"] == pytest.approx(first.evidence.figures["kid_efflite0"])
    logged = load_text(f"runs:/{second.version.run_id}/evaluation/champion_comparison.json")
    assert ChampionComparison.model_validate_json(logged) == better.comparison
    # Neither replaces the page of the other.
    assert (second.folder / "champion_comparison.html").is_file()
    assert not (params.report_folder / "champion_comparison.html").exists()
    again = second.decided()
    assert (again.champion, again.evidence, again.comparison) == (2, None, better.comparison)
    path = params.report_folder / "champion_comparison.json"
    file_bytes = path.read_bytes()
    path.write_bytes(file_bytes.replace(b'"key"', b'"name"'))
    assert second.decided().comparison is None
    path.write_bytes(file_bytes)

    third = Candidate(mlflow_client, params, 3, training_images(params.dataset_folder, 48))
    copier = third.committed()
    assert copier.evidence.verdict == "reject"
    assert "copies of training images: " in copier.evidence.reason
    history = Ledger.of(params.model_name).read()
    assert [entry.what for entry in history.entries] == ["promote", "promote", "reject"]
    assert history.alias_numbers.champion == 2
    assert json.loads(history.entries[2].data)["evidence"]["gate"] == params.gate.model_dump()

    data, entry = read_manifest(params.dataset_folder), history.find_newest_entry(3)
    card = model_card.card(header(), third.evaluation, data, third.version, entry, copier.comparison)
    assert rows(card, "How good it is")["copies_share"][0] == "100.00%"
    assert "copies of training images" in rows(card, "Gate decision")["why"][0]
    assert rows(card, "Gate decision", 1)["memorized"][0] == "reject"
    assert "Copies of training images: 100.00% of" in section(card, "Limits")


def test_rolled_back_version_is_held_without_a_comparison(mlflow_client: MlflowClient, params: Params) -> None:
    old, new = (Candidate(mlflow_client, params, seed, good(48, 5000)) for seed in (1, 2))
    ledger = Ledger.of(params.model_name)
    for what, version in (("promote", old.version), ("promote", new.version), ("rollback", old.version)):
        entry = {"what": what, "version": version.number, "weights_sha256": version.weights_sha256, "by_hand": True}
        ledger.append(partial(History.next_entry, **entry))
    result = new.decided()
    assert (result.champion, result.evidence.verdict, result.comparison) == (1, "hold", None)
    assert "a person decided against it" in result.evidence.reason
