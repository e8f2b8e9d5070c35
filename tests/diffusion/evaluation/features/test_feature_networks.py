"""Feature networks besides the default: those of the literature and of files, known by what they are."""

import functools
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffusion.common.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features import feature_extractor
from diffusion.evaluation.features.feature_extractor import make_extractor


def images(count: int, channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extractor": "inception", "extractor_size": 64}, "299 pixels: leave extractor_size out"),
        ({"extractor_size": 48}, "48 is not a multiple of 32"),
        ({"extractor": "file"}, "set extractor_weights to the path of an .onnx file"),
        ({"extractor_weights": "x.pth"}, "would pass extractor_weights over"),
        ({"extractor": "labels", "extractor_weights": "x.pth"}, "would pass extractor_weights over"),
    ],
)
def test_an_option_without_effect_is_an_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EvaluationConfig(**fields)


def test_options_left_out_are_not_written() -> None:
    assert {"extractor_size", "extractor_weights"}.isdisjoint(EvaluationConfig().model_dump())
    config = EvaluationConfig(extractor="labels", extractor_size=24)
    assert EvaluationConfig.model_validate_json(config.model_dump_json()) == config


# Inception


class Untrained(FeatureExtractorInceptionV3):
    """With the random weights that it begins with."""

    def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
        """Stays as it is."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity's, but for the values."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Untrained("untrained", ["2048"], feature_extractor_weights_path=nothing)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def with_weights(path: Path) -> EvaluationConfig:
    return EvaluationConfig(extractor="inception", extractor_weights=path)


def test_inception_features_equal_torch_fidelity_and_keep_the_random_state(weights: Path) -> None:
    extractor, before = make_extractor(with_weights(weights)), torch.get_rng_state()
    original = FeatureExtractorInceptionV3("original", ["2048"], feature_extractor_weights_path=weights)
    torch.set_rng_state(before)
    grey = images(2, 1, 28)
    features = extractor(grey)
    assert (features.shape, features.dtype) == ((2, 2048), torch.float32)
    (expected,) = original(grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_weights_of_the_literature_are_named_inception(weights: Path) -> None:
    extractor = make_extractor(with_weights(weights))
    assert extractor.name == f"inception_{extractor.digest[:8]}"
    assert extractor.about == "Inception-v3 with the weights in weights.pth, images at 299 pixels"


class Harmful:
    """What a pickle can do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, ...]]:
        return (Path.touch, (self.trace,))  # type: ignore[return-value]


def test_weights_that_are_a_program_do_not_run(tmp_path: Path) -> None:
    torch.save(Harmful(tmp_path / "ran"), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds no weights of torch-fidelity's Inception-v3"):
        make_extractor(with_weights(tmp_path / "weights.pth"))(images(1, 3, 8))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_weights_of_another_network_are_rejected(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth holds no weights of torch-fidelity's Inception-v3"):
        make_extractor(with_weights(tmp_path / "weights.pth"))(images(1, 3, 8))


def test_weights_that_are_not_there_are_missed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights at .*gone\.pth: get them from https://github.com/toshas"):
        make_extractor(with_weights(tmp_path / "gone.pth"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps what it fetches: an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A server of what lies in ``tmp_path/site``."""
    (tmp_path / "site").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_unreachable_weights_are_one_error_with_a_remedy(hub: Path, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_extractor, "URL_INCEPTION_V3", f"{site}/gone.pth")
    with pytest.raises(UserError, match=r"gone\.pth .*cannot be fetched.*set evaluation\.extractor_weights"):
        make_extractor(EvaluationConfig(extractor="inception"))


def test_fetched_weights_of_another_digest_are_rejected_and_leave_nothing(
    hub: Path, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "weights.pth").write_bytes(b"others")
    monkeypatch.setattr(feature_extractor, "URL_INCEPTION_V3", f"{site}/weights.pth")
    with pytest.raises(UserError, match="cannot be fetched"):
        make_extractor(EvaluationConfig(extractor="inception"))
    assert list(hub.iterdir()) == []


def test_fetched_weights_of_the_right_digest_are_fetched_once(
    hub: Path, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    served = tmp_path / "site" / "weights.pth"
    served.write_bytes(weights.read_bytes())
    monkeypatch.setattr(feature_extractor, "URL_INCEPTION_V3", f"{site}/weights.pth")
    monkeypatch.setattr(feature_extractor, "INCEPTION_DIGEST", make_extractor(with_weights(weights)).digest)
    for _ in range(2):
        assert make_extractor(EvaluationConfig(extractor="inception")).name == "inception"
        served.unlink(missing_ok=True)


def test_cached_weights_that_are_damaged_are_rejected(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / feature_extractor.URL_INCEPTION_V3.rpartition("/")[2]).write_bytes(b"damaged")
    with pytest.raises(UserError, match="not the weights that the literature's FID rests on: delete it"):
        make_extractor(EvaluationConfig(extractor="inception"))


# ONNX files


def from_file(path: Path, size: int | None = None) -> EvaluationConfig:
    return EvaluationConfig(extractor="file", extractor_weights=path, extractor_size=size)


def write_means(path: Path, shape: tuple[int | str, ...], kind: str = "float", **options: Any) -> Path:
    """A network whose features are the mean of each channel; ``options``: ``flat`` = False, ``more`` inputs."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    flat = options.get("flat", True)
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=kinds.FLOAT),
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten" if flat else "Identity", ["pooled"], ["features"]),
    ]
    dtype = {"float": kinds.FLOAT, "uint8": kinds.UINT8, "double": kinds.DOUBLE}[kind]
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in ("images", *options.get("more", ()))]
    shape_of_output = [shape[0], shape[1], *([] if flat else [1, 1])]
    outputs = [helper.make_tensor_value_info("features", kinds.FLOAT, shape_of_output)]
    graph = helper.make_graph(nodes, "means", inputs, outputs)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize(("kind", "most"), [("float", 1.0), ("uint8", 255.0)])
def test_network_from_a_file_receives_its_own_input_format(kind: str, most: float, tmp_path: Path) -> None:
    extractor = make_extractor(from_file(write_means(tmp_path / "means.onnx", ("n", 3, "h", "w"), kind), size=16))
    batch = images(70, 3, 16)
    features = extractor(batch)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, batch.float().mean((2, 3)) * most / 255, rtol=1e-5, atol=1e-5)
    grey = images(3, 1, 16)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_images_get_the_size_that_the_network_has(tmp_path: Path) -> None:
    path = write_means(tmp_path / "means.onnx", ("n", 3, 8, 8))
    batch = images(5, 3, 16)
    shrunk = torch.nn.functional.interpolate(batch.float(), (8, 8), mode="bilinear", antialias=True) / 255
    torch.testing.assert_close(make_extractor(from_file(path))(batch), shrunk.mean((2, 3)))


def test_extractors_of_different_files_have_different_digests(tmp_path: Path) -> None:
    digests = [
        make_extractor(from_file(write_means(tmp_path / f"{size}.onnx", ("n", 3, size, size)))) for size in (8, 16)
    ]
    assert len({each.name for each in digests} | {each.digest for each in digests}) == 4
    assert digests[0].name == f"onnx_{digests[0].digest[:8]}"
    assert len({each.preprocessing for each in digests}) == 2


@pytest.mark.parametrize(
    ("shape", "options", "size", "words"),
    [
        ((4, 3, 8, 8), {}, None, "takes 4 images at a time instead of any number"),
        (("n", 3, 8, 4), {}, None, "images of 8×4 instead of square ones"),
        (("n", 3, 8, 8), {}, 8, "takes images of 8 pixels alone: leave evaluation.extractor_size out"),
        (("n", 3, "h", "w"), {}, None, "any size: set evaluation.extractor_size"),
        (("n", 4, 8, 8), {}, None, "instead of float or uint8 images"),
        (("n", 3, 8, 8), {"kind": "double"}, None, "instead of float or uint8 images"),
        (("n", 3, 8, 8), {"more": ["again"]}, None, "instead of float or uint8 images"),
        (("n", 3, 8, 8), {"flat": False}, None, "instead of float features"),
    ],
)
def test_a_network_of_something_else_is_rejected(
    shape: tuple[int | str, ...], options: dict[str, Any], size: int | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        make_extractor(from_file(write_means(tmp_path / "means.onnx", shape, **options), size))


def test_network_for_grey_images_rejects_colour_images(tmp_path: Path) -> None:
    extractor = make_extractor(from_file(write_means(tmp_path / "means.onnx", ("n", 1, 8, 8))))
    assert extractor(images(2, 1, 8)).shape == (2, 1)
    with pytest.raises(UserError, match="takes grey images, and these have colours"):
        extractor(images(2, 3, 8))


def test_weights_outside_the_file_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    path = write_means(tmp_path / "means.onnx", ("n", 3, 8, 8))
    model = onnx.load(path)
    added = onnx.helper.make_tensor("added", onnx.TensorProto.FLOAT, [1, 3], [1.0, 2.0, 3.0])
    added.raw_data = torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    del added.float_data[:]
    model.graph.initializer.append(added)
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(onnx.helper.make_node("Add", ["flat", "added"], ["features"]))
    onnx.save(model, path)
    assert make_extractor(from_file(path))(images(1, 3, 8)).shape == (1, 3)
    onnx.save(model, path, save_as_external_data=True, location="beside.bin", size_threshold=0)
    assert (tmp_path / "beside.bin").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"means\.onnx is not an ONNX network that onnxruntime .* can run.*all in one file"
    ):
        make_extractor(from_file(path))


def test_invalid_onnx_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "network.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"TorchScript and pickles are programs.*torch\.onnx\.export"):
        make_extractor(from_file(tmp_path / "network.pt"))
    with pytest.raises(UserError, match=r"no network at evaluation\.extractor_weights"):
        make_extractor(from_file(tmp_path / "gone.onnx"))


def test_bytes_that_are_no_network_are_rejected(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "network.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="is not an ONNX network"):
        make_extractor(from_file(tmp_path / "network.onnx"))


def test_without_onnxruntime_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "network.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install -e '\.\[onnx\]'"):
        make_extractor(from_file(tmp_path / "network.onnx"))
