"""Images of three shapes from their source to S3 and back, against real servers."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.client import MlflowClient
from PIL import Image

import diffusion
from diffusion.checkpoints import load_model
from diffusion.common.image_grids import to_pil_image
from diffusion.evaluation.results import Evaluation
from diffusion.generation.generate import sample
from tests.builders.workspace import PARAMS, Workspace, objects, running

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]

SIZES = ((48, 24), (24, 48), (32, 32))
"""Width and height of the images."""
SETTINGS = {
    "ingest": {"size": 16, "fit": "bucket", "buckets": ["24x12", "12x24", "16x16"], "held_out": 0.4},
    "training": PARAMS["training"] | {"images": 800, "checkpoints": 2},
    "evaluation": {"samples": 72, "extractor_size": 32},
}


def write_images(folder: Path, count: int = 210) -> None:
    """Discs in two colours, a class each, on grounds of three shapes."""
    for number in range(count):
        random = np.random.default_rng(number)
        width, height = SIZES[number % 3]
        rows, columns = np.mgrid[:height, :width]
        x, y = random.uniform(0.3, 0.7, 2) * (width, height)
        pixels = random.integers(0, 40, (height, width, 3), np.uint8)
        pixels[np.hypot(rows - y, columns - x) < 7] = ((230, 60, 40), (40, 90, 220))[number % 2]
        path = folder / ("red", "blue")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | SETTINGS, 1) as space:
        write_images(space.folder / "pictures")
        yield space


@pytest.mark.parametrize("form", [pytest.param("png", marks=pytest.mark.long), "tar"])
def test_rectangles_go_from_their_source_to_s3_and_back(workspace: Workspace, server: MlflowClient, form: str) -> None:
    result = workspace.json("retrain", "pictures", "--count", "8", "--seed", "5")
    version = server.get_model_version_by_alias("blobs", "champion")
    weights = workspace.folder / "runs" / "blobs" / "final.safetensors"
    model = load_model(weights)
    assert set(model.header.shapes or ()) == {(12, 24), (24, 12), (16, 16)}

    evaluation = Evaluation.read(workspace.folder / "reports" / "blobs" / "evaluation.json")
    by_shape = evaluation.best.per_shape
    assert by_shape is not None
    assert [each.name for each in by_shape.shapes] == ["12x24", "16x16", "24x12"]
    assert sum(each.samples for each in by_shape.shapes) == 72
    for each in by_shape.shapes:
        share = each.reference / sum(other.reference for other in by_shape.shapes)
        assert abs(each.samples - 72 * share) < 1
        if each.kid is not None:
            assert each.kid.interval.low < each.kid.value < each.kid.interval.high
    assert "<h2>Shapes</h2>" in (workspace.folder / "reports" / "blobs" / "report.html").read_text()

    # The shape of most training images by default, or that of each row.
    default = objects(workspace, result["samples"]["uri"])
    height, width = next(iter(model.header.trained_shapes))
    assert Image.open(io.BytesIO(default["00000003.png"][1])).size == (width, height)
    sizes = ["24x12", "20x28", "", "16x16", "12x24"] * 4
    table = workspace.folder / f"{form}.csv"
    table.write_text("\n".join(["label,size", *(f"red,{size}" for size in sizes)]))
    words = ["--set", f"sampling_batch.format={form}", "--seed", "7"]
    batch = workspace.json("sample", "--requests", str(table), *words)
    contents = objects(workspace, batch["uri"])
    rows = pq.read_table(io.BytesIO(contents["manifest.parquet"][1])).to_pylist()
    sizes_of_rows = [(row["width"], row["height"]) for row in rows]
    expected = [tuple(map(int, size.split("x"))) if size else (width, height) for size in sizes]
    assert sizes_of_rows == expected
    assert Counter(sizes_of_rows)[20, 28] == 4

    if form == "png":
        row = rows[6]
        png = Image.open(io.BytesIO(contents["00000006.png"][1]))
        assert (row["index"], png.size) == (6, (20, 28))
        about = json.loads(contents["batch.json"][1])
        assert about["requests"]["columns"] == ["label", "size"]
        image = f"{batch['uri']}00000006.png"
        traced = workspace.json("trace", image)
        assert version.run_id in json.dumps(traced)
    else:
        image = batch["uri"]
    again = workspace.json("reproduce", image, *([] if form == "png" else ["--count", "12"]))
    assert again["exact"] == again["images"] == (1 if form == "png" else 12)

    wide = workspace.json("sample", "--count", "4", "--size", "48x24", "--seed", "9", *words[:2])
    if form == "png":
        stored_image = Image.open(io.BytesIO(objects(workspace, wide["uri"])["00000002.png"][1]))
        assert stored_image.size == (48, 24)
    assert len(workspace.run("sample", "--count", "4", "--size", "4x400", code=2).strip().splitlines()) == 1


def test_the_python_interface_gives_the_image_of_the_batch(workspace: Workspace) -> None:
    result = workspace.json("sample", "--count", "4", "--size", "24x12", "--seed", "3")
    stored_image = Image.open(io.BytesIO(objects(workspace, result["uri"])["00000001.png"][1]))
    # The registered file, which has the guidance that evaluation chose.
    generator = diffusion.load(workspace.folder / "runs" / "blobs" / "weights.safetensors", steps=8, sampler="dpmpp_2m")
    config = generator.sampling.model_copy(update={"compute_batch": 8})
    images = sample(generator.model.with_size((12, 24)), [1], 3, generator.model.header.sampling(config))
    assert to_pil_image(images[0]).tobytes() == stored_image.tobytes()
