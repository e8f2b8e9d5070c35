"""A takedown on one machine holds on all of them, whatever they do at the same time."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
from mlflow.client import MlflowClient
from safetensors.torch import load_file

from diffusion.checkpoints import export, read_model_header
from diffusion.common.errors import UserError
from diffusion.data.manifest import work_folder
from diffusion.data.versions.takedown_records import Selection
from flows import evaluate, ingest, promote, takedown, train
from flows.config import Params
from flows.datasets.checkout import checkout
from flows.environment import data_source, settings
from flows.registry import champion
from flows.registry.dependencies import current_start
from flows.registry.ledger import Evidence, Ledger
from flows.registry.model_versions import Version, cached_checkpoint, get_version, register
from flows.registry.retraining_start import decide_start, resolve_retraining_start
from flows.registry.takedown_marks import find_derived, mark, require_current
from flows.tracking.runs import AUTOENCODER, START, WARM_START
from tests.builders.machines import BASE, FOLDER, NAME, Machine, Machines, before, first_version, machine, two
from tests.builders.model_versions import Killed, add_version, killed
from tests.builders.workspace import PARAMS

__all__ = ["first_version", "machine", "two"]

REMOVED = 3
"""The image that is taken down."""
STEPS = (
    "flows.datasets.catalog:Catalog.publish_removal",
    "flows.datasets.dvc:record_data",
    "flows.datasets.catalog:Heads.advance",
)
"""Of a takedown."""


def test_ingest_elsewhere_does_not_restore_removed_images(two: tuple[Machine, Machine], machine: Machines) -> None:
    one, other = two
    one.take_down(REMOVED)
    assert REMOVED not in one.images
    # Its folder holds the version of before, and its source the image.
    result = other.ingest(200)
    assert other.images == {*BASE, 200} - {REMOVED}
    assert (result.added, other.newest) == (1, other.version.digest)
    fresh = machine("fresh")
    fresh.ingest(*BASE)
    assert fresh.images == other.images


def test_other_data_sets_that_hold_the_image_are_named(two: tuple[Machine, Machine]) -> None:
    one, _ = two
    params = one.params()
    with chdir(one.folder):
        training = params.training.model_copy(update={"dataset": "copies"})
        ingest.ingest.fn(params.model_copy(update={"training": training}))
        removal = takedown.remove.fn(params, Selection(sources=[f"{REMOVED}.png"]), "consent withdrawn")
    for each in two:
        with chdir(each.folder):
            assert takedown.find_elsewhere.fn(params, removal) == ({"copies": removal.image_keys}, [])
    with chdir(one.folder):
        (record, *_) = Path("data/copies/records").iterdir()
        record.write_bytes(b"")
        assert takedown.find_elsewhere.fn(params, removal)[1] == ["copies"]


@pytest.mark.slow
def test_lost_takedown_records_are_fetched_again(two: tuple[Machine, Machine]) -> None:
    one, other = two
    other.take_down(REMOVED)
    for path in (work_folder(one.folder / FOLDER), work_folder(other.folder / FOLDER)):
        for record in path.glob("removals/*.json"):
            record.unlink()
    one.ingest()
    other.ingest()
    assert one.images == other.images == {*BASE} - {REMOVED}


@pytest.mark.parametrize(
    "step",
    [
        "flows.datasets.catalog:Catalog.publish",
        pytest.param("flows.datasets.dvc:record_data", marks=pytest.mark.slow),
        pytest.param("flows.datasets.catalog:Heads.advance", marks=pytest.mark.slow),
    ],
)
def test_images_removed_during_an_ingest_are_not_in_its_version(step: str, two: tuple[Machine, Machine]) -> None:
    one, other = two
    with before(step, lambda: one.take_down(REMOVED)):
        other.ingest(200)
    assert other.images == {*BASE, 200} - {REMOVED}
    assert one.newest == other.version.digest


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_images_ingested_during_a_takedown_are_in_its_version(step: str, two: tuple[Machine, Machine]) -> None:
    one, other = two
    with before(step, lambda: other.ingest(200)):
        removal = one.take_down(REMOVED)
    assert one.images == {*BASE, 200} - {REMOVED}
    assert one.newest == one.version.digest
    assert one.take_down(REMOVED) == removal.model_copy(update={"already": True})


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_takedown_is_finished_by_the_next_command(step: str, two: tuple[Machine, Machine]) -> None:
    one, other = two
    with before(step, killed), pytest.raises(Killed):
        one.take_down(REMOVED)
    other.ingest(200)
    assert (REMOVED in other.images) == step.endswith("publish_removal"), "from its record on, it holds everywhere"
    one.take_down(REMOVED)
    assert one.images == {*BASE, 200} - {REMOVED}
    assert one.newest == one.version.digest


@pytest.mark.slow
def test_takedown_changes_the_newest_version_beside_an_older_checkout(two: tuple[Machine, Machine]) -> None:
    one, other = two
    other.ingest(200)
    one.take_down(200)
    assert one.images == {*BASE}
    assert one.newest == one.version.digest


@pytest.mark.slow
def test_takedown_from_an_older_checkout_keeps_the_newest_images(two: tuple[Machine, Machine]) -> None:
    one, _ = two
    first = one.version.digest
    one.ingest(200)
    one.check_out(first)
    one.take_down(REMOVED)
    assert one.images == {*BASE, 200} - {REMOVED}
    assert one.newest == one.version.digest


# What learned from them


class RunHost:
    """A machine with runs and versions that learned from its data set."""

    def __init__(self, machine: Machine, client: MlflowClient) -> None:
        self.machine, self.client = machine, client
        self.model = f"m-{settings().bucket}"

    def train(self, content: str, **tags: str) -> str:
        """A run on a version of the data set with this content digest."""
        mlflow_experiment = self.client.get_experiment_by_name(self.model)
        experiment = mlflow_experiment.experiment_id if mlflow_experiment else self.client.create_experiment(self.model)
        tags_of_run = {"darkroom.dataset": NAME, "darkroom.content_digest": content, **tags}
        return str(self.client.create_run(experiment, tags=tags_of_run, run_name="train").info.run_id)

    def register(self, run_id: str) -> Version:
        """A version that the run made, with the tags that ``promote`` gives it."""
        tags = {
            name: value for name, value in self.client.get_run(run_id).data.tags.items() if name.startswith("darkroom.")
        }
        return add_version(self.client, self.machine.folder, self.model, run_id=run_id, **tags)

    def commit(self, version: Version) -> list[str]:
        """What is in the ledger once the gate found ``version`` better."""
        gate_evidence = Evidence(verdict="promote", reason="better")
        with chdir(self.machine.folder):
            champion = Ledger.of(self.model).read().alias_numbers.champion
            judgement = promote.GateResult(champion=champion, evidence=gate_evidence)
            return [entry.what for entry in promote.commit(MlflowClient(), version, judgement, None).entries]

    def marks(self, version: Version) -> tuple[str | None, str | None]:
        """Of the version and of its run."""
        tags = get_version(self.client, version.model, version.number).tags
        return tags.get("darkroom.takedown"), self.client.get_run(version.run_id).data.tags.get("darkroom.takedown")


@pytest.fixture
def run_host(two: tuple[Machine, Machine], mlflow_client: MlflowClient) -> RunHost:
    return RunHost(two[0], mlflow_client)


def take_down_and_tag(run_host: RunHost, elsewhere: Machine) -> str:
    """A whole takedown, on another machine."""
    removed_content = elsewhere.version.content_digest
    removal = elsewhere.take_down(REMOVED)
    with chdir(elsewhere.folder):
        descendants = find_derived(NAME, {removed_content}, {removed_content}, settings().bucket)
        mark([run.run_id for run in descendants.runs], [model.uri for model in descendants.models], removal)
    return removal.name


@pytest.fixture
def elsewhere(two: tuple[Machine, Machine]) -> Machine:
    """A machine with the same data set."""
    return two[1]


def test_gate_never_promotes_versions_trained_on_removed_images(run_host: RunHost, elsewhere: Machine) -> None:
    removed_content, others = run_host.machine.version.content_digest, ("d" * 64, "e" * 64, "f" * 64)
    version = run_host.register(run_host.train(removed_content))
    later = run_host.register(run_host.train(others[0], **{START: version.uri}))
    inside = run_host.register(run_host.train(others[1], **{AUTOENCODER: later.uri}))
    clean = run_host.register(run_host.train(others[2]))
    # As if it were killed right after that: nothing is marked in MLflow.
    removal = elsewhere.take_down(REMOVED)
    for each in (inside, later, version):
        with pytest.raises(UserError, match=rf"taken down since \(takedown {removal.name}\)"):
            run_host.commit(each)
        assert run_host.marks(each) == (removal.name, removal.name)
    with pytest.raises(UserError, match="--taken-down"):
        champion.promote(run_host.model, inside.number)
    assert run_host.commit(clean) == ["promote"]
    assert run_host.marks(clean) == (None, None)


def test_takedown_during_a_promotion_stops_it_or_tags_the_version(run_host: RunHost, elsewhere: Machine) -> None:
    first, second = (run_host.register(run_host.train(run_host.machine.version.content_digest)) for _ in range(2))
    with before("flows.promote:next_entry", lambda: take_down_and_tag(run_host, elsewhere)):
        assert run_host.commit(first) == ["promote"]
    assert all(run_host.marks(first)), "it was past the check: so the takedown found it"
    with pytest.raises(UserError, match="train again"):
        run_host.commit(second)


@pytest.mark.slow
def test_takedown_before_the_final_check_stops_the_promotion(run_host: RunHost, elsewhere: Machine) -> None:
    version = run_host.register(run_host.train(run_host.machine.version.content_digest))
    takedown = before("flows.registry.ledger:Ledger.append", lambda: take_down_and_tag(run_host, elsewhere))
    with takedown, pytest.raises(UserError, match="train again"):
        run_host.commit(version)
    assert Ledger.of(run_host.model).read().entries == ()


def test_nothing_starts_from_a_version_with_removed_images(run_host: RunHost, elsewhere: Machine) -> None:
    removal = elsewhere.take_down(REMOVED)
    params = run_host.machine.params()
    steps: list[Callable[[], object]] = [
        lambda: train.train_and_track.fn(params, "never"),
        lambda: evaluate.evaluate_models.fn(params, params.report_folder, None),
    ]
    with chdir(run_host.machine.folder):
        for step in steps:
            with pytest.raises(UserError, match=rf"data checkout {removal.version[:12]} --dataset {NAME}"):
                step()
        checkout(FOLDER, removal.version, data_source)
        require_current(FOLDER)


@pytest.mark.slow
def test_takedown_during_training_fails_the_run(run_host: RunHost, elsewhere: Machine) -> None:
    parts = {name: PARAMS[name] for name in ("model", "sampling")}
    training = PARAMS["training"] | {"images": 64, "checkpoints": 1, "warmup_images": 16}
    params = Params.model_validate(parts | {"training": training, "registry": {"model": run_host.model}})
    names = []
    with chdir(run_host.machine.folder):
        takedown = before("flows.train:_finish", lambda: names.append(elsewhere.take_down(REMOVED).name))
        with takedown, pytest.raises(UserError, match="data checkout"):
            train.train_and_track.fn(params, "never")
        (run,) = run_host.client.search_runs([run_host.client.get_experiment_by_name(run_host.model).experiment_id])
    assert (run.info.status, run.data.tags["darkroom.takedown"]) == ("FAILED", names[0])


def test_champion_of_removed_images_is_not_initial_weights(
    run_host: RunHost, elsewhere: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    params = run_host.machine.params()
    training = params.training.model_copy(update={"init_from": "champion"})
    params = params.model_copy(
        update={"training": training, "registry": params.registry.model_copy(update={"model": run_host.model})}
    )
    version = run_host.register(run_host.train(run_host.machine.version.content_digest))
    run_host.commit(version)
    with chdir(run_host.machine.folder):
        uri = f"models:/{run_host.model}@champion"
        begun = current_start(params, uri)
        assert begun is not None
        assert begun.uri == version.uri
        elsewhere.take_down(REMOVED)
        assert current_start(params, uri) is None
    assert "random weights" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_takedown_ends_a_chain_of_warm_starts(run_host: RunHost, elsewhere: Machine) -> None:
    parts = {name: PARAMS[name] for name in ("model", "sampling")}
    training = PARAMS["training"] | {"images": 64, "checkpoints": 1, "warmup_images": 16}
    params = Params.model_validate(parts | {"training": training, "registry": {"model": run_host.model}})

    def night() -> Version:
        """Train, and promote what was trained."""
        start = resolve_retraining_start(params).apply(params)
        run = run_host.client.get_run(train.train_and_track.fn(start, "set_aside").run_id)
        [_, checkpoint] = sorted((params.run_folder / "checkpoints").glob("*.safetensors"))
        export(checkpoint, weights := params.run_folder / "weights.safetensors")
        names = ("darkroom.dataset", "darkroom.content_digest", START, WARM_START)
        tags = {name: run.data.tags.get(name) for name in names}
        version = register(params.model_name, run.info.run_id, weights, params.sampling, tags, 64, checkpoint)
        assert run_host.commit(version) == ["promote"] * version.number
        return version

    with chdir(run_host.machine.folder):
        first = night()
        run_host.machine.ingest(200)
        second = night()
        assert (second.tags[START], second.tags[WARM_START]) == (first.uri, "1")
        assert read_model_header(params.run_folder / "final.safetensors").images == 16
        state = load_file(cached_checkpoint(first))
        begun = load_file(params.run_folder / "checkpoints" / "0000000000.safetensors")
        assert all(state[name].equal(value) for name, value in begun.items())
        take_down_and_tag(run_host, elsewhere)
        assert all(run_host.marks(first))
        assert all(run_host.marks(second))
        assert decide_start(params).version is None
