"""Features of a network that somebody else trained, from an ONNX file.

ONNX is data: a graph of known operators, and nothing in it runs that is not onnxruntime's own. TorchScript is not
supported. Its files are programs in a zip of pickles, which ``torch.jit.load`` builds and runs; no digest makes a
program that nobody has read safe to run, and ``torch.onnx.export`` writes the same network as data.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.errors import UserError
from diffusion.files import sha256_bytes
from diffusion.lanes import lanes

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

BATCH = 32
"""Pictures per pass."""
KINDS = ("tensor(float)", "tensor(uint8)")
"""What networks may be shown: float32 from 0 to 1, or uint8 from 0 to 255."""


@dataclass(frozen=True)
class OnnxFile:
    """The network in an ONNX file: pictures (N, C, S, S) to features (N, D) float32, for any N.

    What it is shown is RGB, or grey if it has one channel, resized with antialiased bilinear interpolation; whatever
    else a picture needs is in the file.
    """

    path: Path
    digest: str
    """SHA-256 of the file."""
    session: "InferenceSession"
    channels: int
    """Of the pictures that it takes: 1 or 3."""
    size: int
    """Height and width of them."""
    kind: str
    """One of KINDS."""

    @property
    def name(self) -> str:
        """Scores of two files never have the same name."""
        return f"onnx_{self.digest[:8]}"

    @property
    def preprocessing(self) -> str:
        """What is done to pictures before."""
        return f"{self.channels} channels, {self.size} px, antialiased bilinear, {self.kind}"

    @property
    def about(self) -> str:
        """What it is."""
        return f"the network in {self.path.name}, pictures at {self.size} pixels"

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, (N, D) float32, of ``pictures``, (N, C, H, W) uint8 with C 1 or 3."""
        if pictures.shape[1] > self.channels:
            raise UserError(f"the network in {self.path} takes grey pictures, and these have colours: use another file")
        with lanes() as pool:
            return torch.cat(list(pool.map(self._batch, torch.split(pictures, BATCH))))

    @torch.inference_mode()
    def _batch(self, pictures: Tensor) -> Tensor:
        x = pictures.expand(-1, self.channels, -1, -1).float()
        x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = x / 255 if self.kind == "tensor(float)" else x.round().to(torch.uint8)
        (features,) = self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(features)


def open_onnx(path: Path, size: int | None) -> OnnxFile:
    """The network in the file at ``path``; ``size`` is the height and width of what it is shown, if it takes any.

    Raises UserError if it is no .onnx file, or holds a network that makes something else of something else.
    """
    data = _read(path)
    session = _session(path, data)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type not in KINDS or _rank(inputs[0]) != 4 or inputs[0].shape[1] not in (1, 3):
        raise _unfit(path, f"takes {_said(inputs)}", "float or uint8 pictures (N, 1 or 3, H, W) and nothing else")
    if len(outputs) != 1 or outputs[0].type != "tensor(float)" or _rank(outputs[0]) != 2:
        raise _unfit(path, f"gives {_said(outputs)}", "float features (N, D) and nothing else")
    count, channels, height, width = inputs[0].shape
    if isinstance(count, int):
        raise _unfit(path, f"takes {count} pictures at a time", "any number (a dynamic first dimension)")
    return OnnxFile(path, sha256_bytes(data), session, channels, _size(path, height, width, size), inputs[0].type)


def _read(path: Path) -> bytes:
    if path.suffix != ".onnx":
        raise UserError(
            f"evaluation.extractor_weights = {path} is no .onnx file, and TorchScript and pickles are programs, which "
            "are not run here: write the network with torch.onnx.export"
        )
    if not path.is_file():
        raise UserError(f"no network at evaluation.extractor_weights = {path}: give the path of an .onnx file")
    return path.read_bytes()


def _session(path: Path, data: bytes) -> "InferenceSession":
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(
            "evaluation.extractor = file reads ONNX by onnxruntime, which is not installed: "
            "run `pip install -e '.[onnx]'` in Darkroom's checkout"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # lanes compute side by side
    options.log_severity_level = 4  # errors come as exceptions
    with tempfile.TemporaryDirectory() as nothing:
        # Weights in files beside it would not be in its digest: they are looked for where there are none.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's many errors have no base of their own
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{path} is no ONNX network that onnxruntime {onnxruntime.__version__} can run ({reason}): export it "
                "again, all in one file"
            ) from error


def _size(path: Path, height: int | str | None, width: int | str | None, asked: int | None) -> int:
    """Of the pictures it is shown: its own or, where it takes any, the one ``asked`` for."""
    if not isinstance(height, int) and not isinstance(width, int):
        if asked is None:
            raise UserError(
                f"the network in {path} takes pictures of any size: set evaluation.extractor_size to the one that it "
                "was trained on"
            )
        return asked
    if not isinstance(height, int) or height != width:
        raise _unfit(path, f"takes pictures of {height}×{width}", "square ones")
    if asked is not None:
        raise UserError(
            f"the network in {path} takes pictures of {height} pixels alone: leave evaluation.extractor_size out"
        )
    return height


def _rank(value: Any) -> int:
    return len(value.shape)


def _said(values: list[Any]) -> str:
    return ", ".join(f"{each.type} {tuple(each.shape)}" for each in values)


def _unfit(path: Path, found: str, wanted: str) -> UserError:
    return UserError(f"the network in {path} {found} instead of {wanted}: export it again so")
