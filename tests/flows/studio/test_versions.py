"""The studio's tabs of a registered model: votes, the ledger, batches and training images, without a browser."""

from pathlib import Path

import numpy as np
import pytest
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.common.errors import ConflictError, UserError
from diffusion.data.dataset import Dataset
from diffusion.generation.config import Conditions
from diffusion.process.samplers import sampling_config
from flows.provenance.trace import Trace, TracedData
from flows.registry import champion
from flows.registry.model_versions import Version
from flows.sampling import generate_batch
from flows.storage.s3 import Store
from tests.builders.gc_batches import generate
from tests.builders.model_versions import add_version
from tests.builders.sampling_batches import batch
from tests.builders.small_models import write_model

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.app import build
from flows.studio.batches import list_batches, load_page, matching_rows, nearest_training_images, select_batches
from flows.studio.comparison import VOTES, VoteSession, cast, follow, load_version, open_ballot, read_versions
from flows.studio.ledger import read_history, roll_back_from, timeline

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)


def test_votes_are_blind_and_recorded_on_the_candidate(
    mlflow_client: MlflowClient, versions: list[Version], bucket: str
) -> None:
    numbers, aliases = read_versions(bucket)
    assert (numbers, aliases.champion) == ([2, 1], 2)
    ballot = open_ballot(bucket, 2, 1, 5, 3, {"label": "odd"}, SAMPLING)
    source = load_version(f"models:/{bucket}/1", SAMPLING)
    shown = source.generate({"task": "sample", "seed": 5, "count": 3, "label": "odd"})
    assert [Image.open(path).tobytes() for path in shown.paths] == [
        each.tobytes() for each in ballot.images["candidate"]
    ]
    assert len({image.tobytes() for images in ballot.images.values() for image in images}) == 6
    preferred = {"candidate": 0, "champion": 0}
    for side in ("left", "right"):
        pair, left = ballot.pair, ballot.session.left_version(ballot.pair or 0)
        sides = ballot.sides()
        assert pair is not None
        assert sides[0] == ballot.images[left][pair]
        preferred[left if side == "left" else {"candidate": "champion", "champion": "candidate"}[left]] += 1
        ballot, tally = cast(ballot, side)  # type: ignore[arg-type]
    ballot, tally = cast(ballot, "equal")
    assert ballot.sides() is None
    expected = f"candidate {preferred['candidate']}, champion {preferred['champion']} (version 2), no difference 1"
    assert tally == expected
    assert mlflow_client.get_model_version(bucket, "1").tags[VOTES] == expected
    # What another person votes is added, and what was cast can be read again.
    other, _ = cast(open_ballot(bucket, 2, 1, 6, 2, {}, SAMPLING), "equal")
    assert mlflow_client.get_model_version(bucket, "1").tags[VOTES].endswith("no difference 2")
    assert VOTES not in mlflow_client.get_model_version(bucket, "2").tags
    record = Path(mlflow_client.download_artifacts(versions[0].run_id, ballot.session.artifact)).read_text()
    assert VoteSession.model_validate_json(record) == ballot.session
    assert other.session.shuffle_seed != ballot.session.shuffle_seed


def test_sides_are_shuffled_evenly_by_the_recorded_seed() -> None:
    sides = {"sampling": {"candidate": SAMPLING, "champion": SAMPLING}, "conditions": {}, "model": "m"}
    session = VoteSession.model_validate(
        {**sides, "champion": 1, "candidate": 2, "seed": 0, "shuffle_seed": 3}, from_attributes=True
    )
    left = [session.left_version(pair) for pair in range(1000)]
    # Binomial: 3.3 standard deviations.
    assert abs(left.count("candidate") - 500) < 52
    assert left == [session.model_copy().left_version(pair) for pair in range(1000)]
    assert left != [session.model_copy(update={"shuffle_seed": 4}).left_version(pair) for pair in range(1000)]


def test_images_are_those_of_the_champion_after_a_rollback(
    mlflow_client: MlflowClient, versions: list[Version], bucket: str, tmp_path: Path
) -> None:
    source, uri = load_version(versions[1].uri, SAMPLING), f"models:/{bucket}@champion"
    assert follow(source, uri).name == versions[1].uri
    roll_back_from(bucket, 2, "draws three eyes")
    now = follow(source, uri)
    words = now.generate({"task": "sample"}).note
    assert now.name == versions[0].uri
    assert versions[0].uri in words
    other = write_model(tmp_path / "3.safetensors", 3, 3, classes={"even": 3, "odd": 1, "prime": 2}).read_bytes()
    add_version(mlflow_client, tmp_path / "registry", bucket, data=other, run_id=versions[0].run_id)
    champion.promote(bucket, 3)
    with pytest.raises(ConflictError):
        follow(source, uri)


def test_a_rollback_needs_a_reason_and_the_shown_champion(versions: list[Version], bucket: str) -> None:
    with pytest.raises(UserError):
        roll_back_from(bucket, 2, "  ")
    with pytest.raises(ConflictError):
        roll_back_from(bucket, 1, "draws three eyes")
    assert read_history(bucket).alias_numbers.champion == 2
    roll_back_from(bucket, 2, "<script>three eyes</script>")
    history = read_history(bucket)
    assert history.alias_numbers.champion == 1
    rows = timeline(history)
    assert rows.index("3. rollback") < rows.index("1. promote")
    assert "&lt;script&gt;three eyes" in rows
    assert "<script>" not in rows


def test_a_page_of_a_registered_model_has_all_tabs(versions: list[Version], bucket: str) -> None:
    import gradio as gr

    page = build(load_version(versions[0].uri, SAMPLING), bucket)
    labels = [each.label for each in page.blocks.values() if isinstance(each, gr.Tab)]
    assert labels == ["Generate", "Inpaint", "Img2img", "Interpolate", "Compare", "Batches", "Ledger", "Train"]


def test_batches_are_listed_and_filtered(store: Store, bucket: str, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "weights.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    requests = {
        "odd": batch(20, conditions=Conditions(labels=("odd",))),
        "mixed": batch(20, version=4, conditions=Conditions(labels=("odd", "even")), format="tar"),
        "begun": batch(20, version=4, seed=8),
        "deleted": batch(20, version=4, seed=9),
    }
    for name, planned_batch in requests.items():
        place = generate_batch.find_default_place(store, planned_batch, bucket)
        if name == "begun":
            generate_batch.begin(store, planned_batch, place, None)
        else:
            generate(store, planned_batch, bucket, weights)
        if name == "deleted":
            store.put_once(bucket, f"deleted/{place.prefix}", b"")
    store.put_once(bucket, "samples/.probe", b"of another program")
    store.put_once(bucket, "samples/blobs/notes.txt", b"of a person")
    listed = list_batches(store, bucket)
    assert {each.place.prefix.rpartition("/")[2] for each in listed} == {
        requests[name].name for name in ("odd", "mixed", "begun")
    }
    assert [each.finished for each in listed if each.batch.seed == 8] == [False]
    assert {each.batch.version for each in select_batches(listed, "blobs", 4)} == {4}
    assert select_batches(listed, "others") == []
    mixed = select_batches(listed, version=4)
    rows = list(matching_rows(store, mixed, "EVEN"))
    assert [row["index"] for _, row in rows] == list(range(1, 20, 2))
    assert [row["label"] for _, row in matching_rows(store, select_batches(listed, version=3))] == ["odd"] * 20
    items, addresses, is_last = load_page(store, mixed, "even", 1)
    assert addresses == [f"{each.place}/{row['key']}" for each, row in rows]
    assert len({image.tobytes() for image, _ in items if not isinstance(image, Path)}) == 10
    assert is_last
    assert load_page(store, mixed, "even", 2) == ([], [], True)
    # Two batches have an image 0 each, and the caption says of which batch it is.
    pages = [load_page(store, listed, "", page) for page in (1, 2)]
    assert [(len(items), is_last) for items, _, is_last in pages] == [(24, False), (16, True)]
    assert len({caption for items, *_ in pages for _, caption in items}) == 40


def test_an_image_of_the_training_set_is_its_own_nearest(no_servers: None, dataset: Path) -> None:
    training_set = Dataset.open(dataset)
    row = int(training_set.rows("train")[5])
    pixels = training_set.pixels([row])[0]
    manifest = training_set.manifest
    data = TracedData(
        dataset="blobs",
        version=manifest.digest,
        content_digest=manifest.content_digest,
        dvc_digest=None,
        recorded=None,
        images=manifest.kept,
        sources=[],
        shards=[],
    )
    unknown = dict.fromkeys(("image", "place", "batch", "finished", "request", "model", "run"))
    lineage = Trace.model_validate({**unknown, "data": data, "takedowns": [], "origins": [], "broken": []})
    items, _ = nearest_training_images(pixels.squeeze(-1), lineage)
    assert np.array_equal(np.asarray(items[0][0]), pixels.squeeze(-1))
    assert items[0][1].startswith("0.0")
    elsewhere = lineage.model_copy(update={"data": data.model_copy(update={"dataset": "not-here"})})
    assert nearest_training_images(pixels.squeeze(-1), elsewhere)[0] == []
