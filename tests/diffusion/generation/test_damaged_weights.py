"""A damaged model is refused wherever it is read: no black images, and no version or champion of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.checkpoints import AVERAGED, export, load_model, read_tensors, save_tensors, verify_weights
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.diffusers_format.import_model import import_file
from diffusion.families.model import to_uint8
from tests.builders.small_models import write_lora, write_model


def load(path: Path, folder: Path) -> None:
    load_model(path)


def export_model(path: Path, folder: Path) -> None:
    export(path, folder / "exported.safetensors")


def import_model(path: Path, folder: Path) -> None:
    import_file(str(path), folder / "imported.safetensors", "CC0-1.0", folder)


READERS = pytest.mark.parametrize("read", [load, export_model, import_model])


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place, 2 if place < 0 else 0)
        file.write(data)


@READERS
@pytest.mark.parametrize("data", [b"\xff" * 64, b"\0" * 64], ids=["not finite", "finite"])
def test_overwritten_bytes_are_found_by_every_reader(
    tmp_path: Path, read: Callable[[Path, Path], None], data: bytes
) -> None:
    path = write_model(tmp_path / "model.safetensors", seed=0, images=1)
    read(path, tmp_path)
    overwrite(path, -256, data)
    with pytest.raises(UserError, match="damaged"):
        read(path, tmp_path)


@READERS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_every_reader(
    tmp_path: Path, read: Callable[[Path, Path], None], value: float
) -> None:
    path = write_model(tmp_path / "model.safetensors", seed=0, images=1, guide=1)
    tensors = read_tensors(path, "")
    tensors["guide.head.weight" if "guide.head.weight" in tensors else max(tensors)].view(-1)[3] = value
    save_tensors(path, tensors, read_header(path))
    with pytest.raises(UserError, match="not finite"):
        read(path, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float64, 1e300),
        (torch.complex64, 1),
        (torch.float8_e5m2, float("inf")),
        (torch.float8_e4m3fn, float("nan")),
    ],
    ids=str,
)
def test_weights_of_other_types_are_judged_as_they_are_used(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path = write_model(tmp_path / "model.safetensors", seed=0, images=1)
    tensors = read_tensors(path, "")
    name = max(name for name in tensors if name.startswith(AVERAGED))
    tensors[name] = torch.full_like(tensors[name], value, dtype=torch.float32 if dtype.itemsize == 1 else dtype).to(
        dtype
    )
    save_tensors(path, tensors, read_header(path))
    with pytest.raises(UserError, match="not finite"):
        load_model(path)


def test_a_changed_header_is_damage_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", seed=0, images=7)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"images\\":7', b'\\"images\\":8'))
    with pytest.raises(UserError, match="damaged"):
        load_model(path)


def test_damage_to_a_base_is_found_through_its_adapter(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora.safetensors", write_model(tmp_path / "base.safetensors", 0, 1), seed=1)
    verify_weights(adapter)
    (base,) = tmp_path.glob("[0-9a-f]" * 64 + ".safetensors")
    base.unlink()  # it is a hard link
    write_model(base, seed=2, images=1)
    with pytest.raises(UserError, match="damaged"):
        verify_weights(adapter)


def test_files_of_before_there_was_a_digest_still_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from diffusion.common.files import canonical_json

    path = write_model(tmp_path / "model.safetensors", seed=0, images=1)
    header = {key: value for key, value in read_header(path).items() if key != "content_sha256"}
    tensors = read_tensors(path, "")
    save_file(tensors, path, {"darkroom": canonical_json(header)})
    weights = load_model(path).network.state_dict()
    assert all(torch.equal(value, tensors[AVERAGED + name]) for name, value in weights.items())


def test_images_that_are_not_finite_are_an_error() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError):
        to_uint8(images)
