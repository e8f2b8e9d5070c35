"""Curation: what rules drop is what was planted, whatever the history, the workers and kills."""

import io
import shutil
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx import save as save_onnx
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from diffusion.common.errors import UserError
from diffusion.curation import curate as curation
from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import CurationResult, curate
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import merge_versions
from diffusion.data.manifest import STORED, read_manifest, work_folder
from diffusion.data.tables import content_digest
from diffusion.data.versions.difference import diff
from diffusion.data.versions.takedown import remove, remove_known
from diffusion.data.versions.takedown_records import Selection, find_affected_versions, write_removal
from diffusion.data.versions.versions import log, show
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.metrics.registration import shrink_and_blur
from tests.builders.ingested import files_of, records
from tests.builders.planted import plant, scene
from tests.builders.real_images import digits
from tests.builders.real_images import images as real_images

if TYPE_CHECKING:
    from diffusion.curation.duplicates import Appearance

EVALUATION = EvaluationConfig()
SHARP = {"min_sharpness": 30}


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 48, "held_out": 0.3, "workers": 1} | fields)


def rules(folder: Path, dry_run: bool = False, **fields: object) -> CurationResult:
    ingest_config = config(folder)
    return curate(folder, CurationConfig.model_validate(fields), ingest_config, EVALUATION, dry_run=dry_run)


def dropped(folder: Path) -> dict[str, str]:
    return {str(row["source"]): str(row["reason"]) for row in records(folder) if row["outcome"] == "dropped"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]]]:
    root = tmp_path_factory.mktemp("planted")
    planted = plant(root / "images")
    ingest(root / "data" / "set", config(root / "images"))
    return root, planted


@pytest.fixture
def data(original: tuple[Path, dict[str, set[str]]], tmp_path: Path) -> Path:
    shutil.copytree(original[0] / "data", tmp_path / "data")
    return tmp_path / "data" / "set"


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        (SHARP, {"blurred", "flat"}),
        ({"min_entropy": 2}, {"flat"}),
        ({"min_contrast": 10}, {"flat"}),
        ({"max_border": 0.3}, {"bordered", "flat"}),
        ({"max_text": 0.25}, {"text"}),
        ({"max_aspect": 2}, {"wide"}),
    ],
)
def test_rules_on_single_images_drop_exactly_what_was_planted(
    fields: dict[str, object], kinds: set[str], original: tuple[Path, dict[str, set[str]]], data: Path
) -> None:
    result = rules(data, **fields)
    assert dropped(data).keys() == set().union(*(original[1][kind] for kind in kinds))
    (name, limit), *_ = fields.items()
    assert all(reason.startswith(f"{name} = {limit}: ") for reason in dropped(data).values())
    assert result.rules == {name: result.dropped}


def test_the_largest_of_near_duplicates_stays(original: tuple[Path, dict[str, set[str]]], data: Path) -> None:
    planted = original[1]
    rules(data, near_duplicates="largest", min_entropy=2)
    names = {name for name, reason in dropped(data).items() if reason.startswith("near_duplicates")}
    # Of a larger copy or crop the scene itself goes; of two of equal size either one.
    assert {f"{name[:3]}.png" for name in planted["larger"] | planted["crop"]} <= names
    for name in planted["jpeg"]:
        assert len({name, f"{name[:3]}.png"} & names) == 1
    assert len(names) == 12


def test_one_per_class_keeps_images_of_other_classes(tmp_path: Path) -> None:
    for label, side in (("a", 96), ("b", 64), ("a", 50)):
        path = tmp_path / "images" / label / f"{side}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(1, 96).resize((side, side), Image.Resampling.BICUBIC).save(path)
    for number in range(2, 8):
        scene(number).save(tmp_path / "images" / "a" / f"other-{number}.png")
    folder = tmp_path / "data" / "set"
    ingest(folder, config(tmp_path / "images"))
    assert rules(folder, near_duplicates="report").changed is False
    rules(folder, near_duplicates="one_per_class")
    assert dropped(folder).keys() == {"a/50.jpg"}
    rules(folder, near_duplicates="largest")
    assert dropped(folder).keys() == {"a/50.jpg", "b/64.jpg"}


def test_near_duplicates_form_no_chains() -> None:
    from diffusion.curation.duplicates import leaders_by_hash

    # Each differs from the next one in 10 bits, and the first from the third in 20.
    phashes = [f"{(1 << (10 * step)) - 1:064x}" for step in range(6)]
    order, classes = np.arange(6), [None] * 6
    assert leaders_by_hash(phashes, order, classes, 10).tolist() == [0, 0, 2, 2, 4, 4]
    assert leaders_by_hash(phashes, order[::-1].copy(), classes, 10).tolist() == [1, 1, 3, 3, 5, 5]
    assert leaders_by_hash(phashes, order, list("ababab"), 10).tolist() == [*range(6)]
    assert leaders_by_hash(phashes, order, list("abbaaa"), 10).tolist() == [0, 1, 1, 3, 3, 5]


def test_one_image_in_thousands_of_classes_is_kept_in_each() -> None:
    from diffusion.curation.duplicates import leaders_by_hash

    classes = [f"class {number // 2}" for number in range(10_000)]
    leaders = leaders_by_hash(["ff" * 32] * 10_000, np.arange(10_000), classes, 24)
    np.testing.assert_array_equal(leaders, np.arange(10_000) // 2 * 2)


def appearance(images: Sequence[Image.Image]) -> "Appearance":
    from diffusion.curation.duplicates import Appearance

    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]).transpose(0, 3, 1, 2))
    small = shrink_and_blur(pixels).mul(255).round().byte().flatten(1)
    return Appearance(adaptive_avg_pool2d(pixels.float(), 2).flatten(1), small)


def test_semantic_leaders_are_those_of_a_search_one_by_one() -> None:
    from diffusion.curation.duplicates import CandidatePairs, register_pairs

    panorama = scene(5, 256)
    # Windows that overlap by nine tenths are near each other, and those far apart are not.
    images = [panorama.crop((step * 9, 0, step * 9 + 96, 96)) for step in range(12)]
    images += [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images[:4]]
    looks, limit = appearance(images), 0.3
    every = np.array([*combinations(range(16), 2)])
    distances = dict(zip(map(tuple, every.tolist()), register_pairs(looks.small, every).tolist(), strict=True))
    assert 10 < sum(distance <= limit for distance in distances.values()) < 60
    for classes in ([None] * 16, [*"abababababababab"]):
        order = np.random.default_rng(0).permutation(16)
        expected, kept = np.arange(16), list[int]()
        for row in order.tolist():
            near = [
                (distances[min(row, other), max(row, other)], other)
                for other in kept
                if classes[row] == classes[other] and distances[min(row, other), max(row, other)] <= limit
            ]
            if near:
                expected[row] = min(near)[1]
            else:
                kept.append(row)
        leaders, separations = CandidatePairs(looks, order, classes).leaders(order, limit)
        assert leaders.tolist() == expected.tolist()
        assert separations[leaders != np.arange(16)].max() <= limit


def test_a_large_group_has_one_leader() -> None:
    from diffusion.curation.duplicates import CandidatePairs

    images = [scene(1, 96).crop((n % 6, n // 6, 90 + n % 6, 90 + n // 6)).resize((64, 64)) for n in range(36)]
    order = np.arange(40)
    leaders, _ = CandidatePairs(appearance([*images, *map(scene, range(2, 6))]), order, [None] * 40).leaders(order, 0.3)
    assert leaders.tolist() == [0] * 36 + [36, 37, 38, 39]


def test_without_rules_nothing_is_measured_and_no_byte_changes(data: Path) -> None:
    before, work = files_of(data), files_of(data.parent / ".set")
    result = rules(data)
    assert (result.changed, result.dropped, result.digest) == (False, 0, read_manifest(data).digest)
    assert files_of(data) == before
    assert files_of(data.parent / ".set") == work


def test_curated_content_equals_a_set_without_the_images(
    original: tuple[Path, dict[str, set[str]]], data: Path, tmp_path: Path
) -> None:
    before = read_manifest(data)
    shards = {entry.name: (data / entry.name).read_bytes() for entry in before.shards}
    result = rules(data, **SHARP)
    after = read_manifest(data)
    assert (after.change, after.parent, after.dropped) == ("curation", before.digest, 8)
    assert after.shards == before.shards
    assert {name: (data / name).read_bytes() for name in shards} == shards
    assert after.content_digest == content_digest(data, after.parts, after.storage) == result.content_digest
    less = tmp_path / "images"
    shutil.copytree(original[0] / "images", less)
    for name in dropped(data):
        (less / name).unlink()
    assert ingest(tmp_path / "other", config(less)).content_digest == after.content_digest
    dataset = Dataset.open(data)
    keys = set(dataset.keys(range(len(dataset))))
    assert len(dataset) == after.kept == before.kept - 8
    assert not keys & {row["key"] for row in records(data) if row["outcome"] == "dropped"}
    assert after.mean != before.mean
    dataset.close()


def test_loosened_rules_bring_images_back(data: Path) -> None:
    before = read_manifest(data)
    rules(data, **SHARP)
    once = dropped(data)
    looser = rules(data, min_sharpness=0.5)
    assert 0 < looser.dropped < len(once)
    assert looser.restored == len(once) - looser.dropped
    again = rules(data)
    assert (again.dropped, again.content_digest) == (0, before.content_digest)
    assert read_manifest(data).parts == before.parts
    assert rules(data).changed is False


def test_the_same_rules_again_change_nothing_and_measure_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules(data, **SHARP)
    before = files_of(data)
    (data.parent / ".set" / "curated.json").unlink()
    monkeypatch.setattr("diffusion.curation.measures.measure_shard", lambda *_: pytest.fail("measured again"))
    assert rules(data, **SHARP).changed is False
    assert files_of(data) == before


def test_dry_runs_say_what_would_be_dropped(data: Path) -> None:
    before = files_of(data)
    preview = rules(data, dry_run=True, **SHARP)
    assert (preview.changed, preview.newly_dropped) == (True, 8)
    assert files_of(data) == before
    result = rules(data, **SHARP)
    assert {each.source: each.reason for each in result.images} == dropped(data)
    assert result.images == preview.images


@pytest.mark.parametrize("runner", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_results_do_not_depend_on_workers(data: Path, tmp_path: Path, runner: str) -> None:
    shutil.copytree(data.parent, tmp_path / "other")
    many = {"near_duplicates": "largest", **SHARP}
    rules(data, **many)
    other = tmp_path / "other" / "set"
    parallel = config(other, runner=runner, workers=3)
    curate(other, CurationConfig.model_validate(many), parallel, EVALUATION)
    assert files_of(other) == files_of(data)


@pytest.mark.parametrize("stop", ["write_manifest", "remove_strays", "write_json"])
def test_a_curation_killed_in_between_ends_the_same(data: Path, stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = data.parent / "expected"
    shutil.copytree(data, expected)
    shutil.copytree(data.parent / ".set", data.parent / ".expected")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(curation, stop, killed)
        with pytest.raises(KeyboardInterrupt):
            rules(data, **SHARP)
    rules(data, **SHARP)
    rules(expected, **SHARP)
    ours, theirs = read_manifest(data), read_manifest(expected)
    assert ours == theirs
    assert files_of(data) == files_of(expected)


def test_damaged_measures_are_measured_again(data: Path) -> None:
    preview = rules(data, dry_run=True, **SHARP)
    for path in (data.parent / ".set" / "measures").iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    assert rules(data, **SHARP).images == preview.images


def test_rules_that_drop_too_much_are_errors(data: Path) -> None:
    before = files_of(data)
    with pytest.raises(UserError, match="max_dropped"):
        rules(data, min_brightness=250)
    with pytest.raises(UserError, match="max_dropped"):
        rules(data, min_side=5000, max_dropped=1)
    assert files_of(data) == before


def test_an_outlier_is_far_from_all_others(data: Path) -> None:
    rules(data, max_outlier=97)
    assert 0 < len(dropped(data)) <= 0.03 * len(records(data)) + 1
    # Images of one colour are like no scene.
    assert sum("flat" in name for name in dropped(data)) >= len(dropped(data)) - 1


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": lambda image: Image.open(io.BytesIO(encoded(image, "JPEG", quality=60))),
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "crop": lambda image: image.crop((0, image.height // 10, image.width * 9 // 10, image.height)),
    "mirror": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    image.save(data := io.BytesIO(), name, **options)
    return data.getvalue()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["digits", "clothes"])
def test_semantic_near_duplicates_are_what_their_name_promises(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.curation.duplicates.CALIBRATION_IMAGES", 50)
    count, copied = 100, 12
    pixels = digits(count)[0] if kind == "digits" else real_images(count)[0]
    originals = [Image.fromarray(image[0].numpy()).convert("RGB").resize((112, 112)) for image in pixels]
    (tmp_path / "images").mkdir()
    for number, image in enumerate(originals):
        image.save(tmp_path / "images" / f"{number:03d}.png")
    for place, (name, alter) in enumerate(ALTERED.items()):
        for number in range(place * copied, (place + 1) * copied):
            alter(originals[number]).convert("RGB").save(tmp_path / "images" / f"{number:03d}-{name}.png")
    ingest(tmp_path / "data" / "set", config(tmp_path / "images"))
    result = rules(tmp_path / "data" / "set", semantic_duplicates="largest")
    pairs = {name.partition(".")[0].partition("-")[0] for name in dropped(tmp_path / "data" / "set")}
    found = [sum(f"{number:03d}" in pairs for number in range(start, start + copied)) for start in range(0, 48, copied)]
    assert min(found) >= 0.8 * copied
    assert sum(found) >= 0.95 * len(ALTERED) * copied
    # Distinct images that are called duplicates: at most one of 52.
    assert sum(int(number) >= copied * len(ALTERED) for number in pairs) <= 1
    assert result.dropped <= copied * len(ALTERED) + 3
    assert result.semantic is not None
    assert result.semantic.recall.keys() == {"JPEG", "half size", "crop", "mirror"}
    assert min(result.semantic.recall.values()) >= 0.95
    assert result.semantic.mistaken is not None
    assert result.semantic.mistaken <= 0.011
    assert result.semantic.warning is None


def test_a_distance_that_misses_copies_is_warned_of(
    data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.curation.duplicates.CALIBRATION_IMAGES", 8)
    result = rules(data, semantic_duplicates="report", semantic_distance=1e-3, min_side=1, dry_run=True)
    assert result.semantic is not None
    assert result.semantic.distance == 1e-3
    assert result.semantic.recall["JPEG"] < 0.95
    assert result.semantic.recall["mirror"] == 1
    assert "JPEG" in caplog.text
    assert "mirror" not in caplog.text


def classifier(path: Path, layout: str = "NCHW") -> Path:
    """A classifier of how red images are: (share of red, 1 − share of red)."""
    shape = ["N", 3, 16, 16] if layout == "NCHW" else ["N", 16, 16, 3]
    axes, float32 = ([2, 3] if layout == "NCHW" else [1, 2]), TensorProto.FLOAT
    weights = np.array([[1.5, -1.5], [-0.75, 0.75], [-0.75, 0.75]], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info("images", float32, shape)]
    outputs = [helper.make_tensor_value_info("scores", float32, ["N", 2])]
    graph = helper.make_graph(nodes, "red", inputs, outputs, [numpy_helper.from_array(weights, "weights")])
    save_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_classifier_of_the_user_drops_what_it_flags(
    layout: str, original: tuple[Path, dict[str, set[str]]], data: Path, tmp_path: Path
) -> None:
    nsfw = {"path": str(classifier(tmp_path / "red.onnx", layout)), "layout": layout, "output": 0}
    rules(data, nsfw=nsfw, max_nsfw=0.61)
    assert dropped(data).keys() == original[1]["skin"]
    rows = {row["source"]: str(row["reason"]) for row in records(data)}
    name = min(original[1]["skin"])
    red, green, blue = np.asarray(Image.open(original[0] / "images" / name)).reshape(-1, 3).mean(0) / 255
    score = 1 / (1 + np.exp(-(1.5 * red - 0.75 * green - 0.75 * blue)))
    assert float(rows[name].rpartition(" ")[2]) == pytest.approx(score, abs=0.01)


def test_a_classifier_is_known_by_its_bytes_and_its_input(data: Path, tmp_path: Path) -> None:
    path = classifier(tmp_path / "red.onnx")
    nsfw = {"path": str(path), "output": 0}
    first = rules(data, dry_run=True, nsfw=nsfw, max_nsfw=0.61)
    assert rules(data, dry_run=True, nsfw=nsfw | {"channels": "BGR"}, max_nsfw=0.61).images != first.images
    assert rules(data, dry_run=True, nsfw=nsfw | {"output": 1}, max_nsfw=0.61).dropped == 0
    path.write_bytes(b"import os")
    with pytest.raises(UserError, match="not an ONNX network"):
        rules(data, nsfw=nsfw, max_nsfw=0.61)
    with pytest.raises(UserError, match="layout"):
        rules(data, nsfw={"path": str(classifier(path)), "layout": "NHWC"}, max_nsfw=0.6)
    with pytest.raises(UserError, match="no classifier"):
        rules(data, nsfw={"path": str(tmp_path / "none.onnx")}, max_nsfw=0.6)


def test_dropped_images_that_return_are_duplicates(
    original: tuple[Path, dict[str, set[str]]], data: Path, tmp_path: Path
) -> None:
    rules(data, **SHARP)
    dropped_images = dropped(data)
    images = tmp_path / "more"
    images.mkdir()
    for name in dropped_images:
        shutil.copy(original[0] / "images" / name, images / f"again-{name}")
    scene(7777).save(images / "new.png")
    Image.new("RGB", (64, 64), "navy").save(images / "new-flat.png")
    again = ingest(data, config(images), requeue=True)
    assert (again.added, again.duplicates) == (2, len(dropped_images))
    assert dropped(data) == dropped_images
    assert rules(data, **SHARP).newly_dropped == 1
    assert dropped(data).keys() == {*dropped_images, "new-flat.png"}
    assert ingest(data, config(images), requeue=True).changed is False
    rules(data)
    assert dropped(data) == {}


def test_a_rebuild_reads_dropped_images_again(original: tuple[Path, dict[str, set[str]]], data: Path) -> None:
    first = read_manifest(data)
    rules(data, **SHARP)
    built = ingest(data, config(original[0] / "images"), rebuild="always")
    assert built.content_digest == first.content_digest
    assert dropped(data) == {}


def test_dropped_images_can_be_taken_down_for_good(original: tuple[Path, dict[str, set[str]]], data: Path) -> None:
    rules(data, **SHARP)
    curated = read_manifest(data)
    name = min(dropped(data))
    (row,) = (row for row in records(data) if row["source"] == name)
    png = next(
        (data / part.shard.name).read_bytes()[row["offset"] : row["offset"] + row["size"]]  # type: ignore[operator]
        for part in curated.parts
        if part.shard
    )
    removal = remove(data, Selection(sources=[name]), "asked to")
    assert (removal.images, removal.image_keys) == (1, [row["key"]])
    after = read_manifest(data)
    assert after.content_digest == curated.content_digest
    assert not any(png in (data / entry.name).read_bytes() for entry in after.shards)
    assert list((data.parent / ".set" / "measures").iterdir()) == []
    assert find_affected_versions(data, removal, [curated]).held == [curated.digest]
    rules(data)
    assert row["key"] not in {each["key"] for each in records(data) if each["outcome"] == "kept"}
    assert ingest(data, config(original[0] / "images"), requeue=True).added == 0


def test_dropped_copies_are_taken_down_with_their_leader(
    original: tuple[Path, dict[str, set[str]]], data: Path, tmp_path: Path
) -> None:
    rules(data, near_duplicates="largest")
    keys = {str(row["source"]): str(row["key"]) for row in records(data) if row["outcome"] == "kept"}
    followers = {str(row["source"]): str(row["key"]) for row in records(data) if row["outcome"] == "dropped"}
    leader = next(name for name in keys if keys[name] in {row.get("leader") for row in records(data)})
    copies = [str(row["source"]) for row in records(data) if row.get("leader") == keys[leader]]
    other = tmp_path / "elsewhere" / "set"
    shutil.copytree(data.parent, other.parent)
    # Without the image that was kept, a copy leaves its siblings and that image.
    assert keys[leader] in remove(tmp_path / "elsewhere" / "set", Selection(sources=copies[:1]), "no").near_copies
    shutil.rmtree(other.parent)
    shutil.copytree(data.parent, other.parent)
    removal = remove(data, Selection(sources=[leader]), "consent withdrawn")
    assert removal.dropped_copies == sorted(followers[name] for name in copies)
    assert {*removal.image_keys} == {keys[leader], *removal.dropped_copies}
    rules(data, near_duplicates="largest")
    assert not {str(row["key"]) for row in records(data) if row["outcome"] in STORED} & {*removal.image_keys}
    # A record that names the image alone takes its copies elsewhere, too.
    alone = removal.model_copy(update={"image_keys": [keys[leader]], "digests": [], "dropped_copies": None})
    write_removal(work_folder(other), alone)
    remove_known(other)
    assert not {str(row["key"]) for row in records(other) if row["outcome"] in STORED} & {*removal.image_keys}


def test_changed_values_in_reasons_rewrite_no_table(data: Path, tmp_path: Path) -> None:
    rules(data, max_outlier=97)
    before, dropped_images = read_manifest(data), dropped(data)
    (more := tmp_path / "more").mkdir()
    for number in range(3):
        scene(9000 + number).save(more / f"{number}.png")
    ingest(data, config(more))
    assert rules(data, max_outlier=97).newly_dropped == 0
    assert dropped(data) == dropped_images
    assert read_manifest(data).parts[: len(before.parts)] == before.parts


def test_a_union_keeps_what_the_other_machine_dropped_out(
    original: tuple[Path, dict[str, set[str]]], data: Path, tmp_path: Path
) -> None:
    base = read_manifest(data)
    other = tmp_path / "there" / "set"
    shutil.copytree(data.parent, other.parent)
    for folder, number in ((data, 8001), (other, 8002)):
        more = tmp_path / f"more-{number}"
        more.mkdir()
        scene(number).save(more / f"{number}.png")
        Image.new("RGB", (64, 64), (number % 256, 0, 99)).save(more / f"flat-{number}.png")
        ingest(folder, config(more))
        rules(folder, **SHARP)
    ours, theirs = read_manifest(data), read_manifest(other)
    for entry in theirs.files:
        if not (data / entry.name).exists():
            shutil.copy(other / entry.name, data / entry.name)
    for path in (other / "versions").iterdir():
        shutil.copy(path, data / "versions" / path.name)
    union = merge_versions(data, config(data), theirs, base)
    assert union.version.dropped == ours.dropped + 1
    assert union.version.kept == ours.kept + 1
    assert union.version.content_digest == content_digest(data, union.version.parts, union.version.storage)
    assert rules(data, **SHARP).newly_dropped == 0


def test_history_shows_what_curation_did(data: Path) -> None:
    before = read_manifest(data)
    rules(data, **SHARP)
    after = read_manifest(data)
    summary = show(data, after, limit=3)
    assert (summary.dropped_count, len(summary.dropped or ())) == (8, 3)
    assert [(each.reason, each.count) for each in summary.rules or ()] == [("min_sharpness", 8)]
    step = next(log(data))
    assert (step.change, step.added, step.removed) == ("curation", 0, 8)
    there = diff(data, before, after)
    assert there.unread == []
    assert there.removed is not None
    assert there.dropped is not None
    assert there.removed.count == there.dropped.count == 8
    assert {each.source: each.reason for each in there.dropped.samples} == dropped(data)
    rules(data)
    back = diff(data, after, read_manifest(data), elsewhere=lambda entry: None)
    assert back.kept == (after.kept, before.kept)


def test_pages_of_curated_ingests_count_dropped_images(data: Path, tmp_path: Path) -> None:
    from diffusion.evaluation.reports.dataset_report import write_dataset_report

    first = read_manifest(data)
    more = tmp_path / "more"
    more.mkdir()
    scene(8801).save(more / "new.png")
    Image.new("RGB", (64, 64), "navy").save(more / "new-flat.png")
    ingest(data, config(more))
    rules(data, min_entropy=2)
    summary = write_dataset_report(data, tmp_path / "page.html")
    assert (summary.dropped, summary.kept) == (5, first.kept + 1 - 4)
    html = (tmp_path / "page.html").read_text()
    assert "Dropped by curation" in html
    assert "min_entropy" in html


def test_shards_of_dropped_images_alone_are_passed_over(data: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for level in range(5):
        Image.new("RGB", (64, 64), (50 * level, 9, 120)).save(more / f"{level}.png")
    ingest(data, config(more))
    rules(data, min_entropy=2)
    after = read_manifest(data)
    assert after.parts[-1].splits == {}
    dataset = Dataset.open(data)
    assert len(dataset) == after.kept
    assert dataset.images(dataset.rows("train")).shape[0] == after.counts["train"]
    assert dataset.captions(range(len(dataset))) == [None] * after.kept
    dataset.close()
