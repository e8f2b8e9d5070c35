"""A trained model: the averaged network with all one needs to know to use it, in one safetensors file."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion.config import LARGEST_SIZE, Config, PlainName, unset
from diffusion.denoiser import Denoiser
from diffusion.errors import UserError
from diffusion.families import family_of
from diffusion.files import canonical_json, write_atomically
from diffusion.models.config import FamilyConfig, LatentSpace, ModelConfig
from diffusion.models.latents import Latents
from diffusion.models.unet import UNet
from diffusion.models.vae import VAE
from diffusion.objective import Parametrization
from diffusion.process import NoiseSchedule
from diffusion.text import TextEncoder

METADATA_KEY = "darkroom"
HEADER = TypeAdapter(dict[str, Any])
"""The one metadata key of our safetensors files: several are written in random order, one is stable."""
AVERAGED = "ema."
"""Prefix of the averaged weights' names, the same in checkpoints and in final models."""
AUTOENCODER = "autoencoder."
"""Prefix of the weights of a latent model's autoencoder, and of the moments of its latents."""
LARGEST_HEADER = 16 * 2**20
"""Bytes of a file's own header, with names and shapes of all tensors, that are read at most."""
Told = dict[str, Tensor]
"""What a network is told of N pictures: ``label`` and ``text``, or ``low`` and ``level``, as ``UNet.forward`` has them,
as far as it is told any."""


class ModelHeader(Config):
    """What is written beside the weights."""

    format_version: Literal[1, 2] = 2
    """In the first, networks that enlarge drew whole pictures, and not what they have beyond the small ones."""
    model: FamilyConfig
    """Instead of the path of its autoencoder, if it has one, the digest of that one's weights."""
    channels: Literal[1, 3]
    size: int = Field(ge=1, le=LARGEST_SIZE)
    """Height and width of the pictures, in pixels."""
    dataset: PlainName
    """Name of the data set."""
    content_digest: str
    """Digest of the data set."""
    sigma_data: float = Field(1.0, gt=0, le=1e6)
    """Standard deviation of what the network works on: the data set's pictures in [−1, 1], what they have beyond small
    ones that it is shown, or latents."""
    class_histogram: dict[str, int]
    """The data set's classes, sorted, and how many pictures of each it has."""
    encoder: TextEncoder | None = None
    """What read the captions that the network was told; None: it was told none."""
    latents: LatentSpace | None = Field(None, exclude_if=unset)
    """What the network works on; None: the pictures themselves."""
    images: int = Field(ge=0, lt=2**63)
    """Pictures seen in training."""
    training: dict[str, Any]
    """The training configuration as it was resolved."""


class Autoencoder(Protocol):
    """Pictures (N, C, H, W), nominally in [−1, 1], to latents (N, c, h, w) and back."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Pictures to latents."""

    def decode(self, z: Tensor, /) -> Tensor:
        """Latents to pictures."""


@dataclass(frozen=True)
class Model(ABC):
    """A network of some family, ready for use."""

    header: ModelHeader
    network: nn.Module

    @property
    def config(self) -> FamilyConfig:
        """Configuration of the network."""
        return self.header.model

    @property
    @abstractmethod
    def coder(self) -> Autoencoder | None:
        """What it has between pictures and latents; None: it works on pictures."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise that a picture is drawn from."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures."""
        return self.header.channels, self.header.size, self.header.size

    @property
    def classes(self) -> list[str]:
        """The classes that it can be asked for; empty if it was not told of any."""
        return classes_of(self.config, self.header.class_histogram)

    def on(self, device: torch.device) -> Self:
        """The same with its network on ``device``; this one stays where it is."""
        if device == next(self.network.parameters()).device:
            return self
        return replace(self, network=copy.deepcopy(self.network).to(device))


@dataclass(frozen=True)
class DiffusionModel(Model):
    """A network that takes noise away, from pictures or from their latents."""

    network: UNet
    schedule: NoiseSchedule
    latents: Latents | None = None
    """Where the network works on latents, what leads there and back."""

    @property
    def config(self) -> ModelConfig:
        """Configuration of the network and its noise schedule."""
        assert isinstance(self.header.model, ModelConfig)
        return self.header.model

    @property
    def coder(self) -> Latents | None:
        """What leads to latents and back, if the network works on latents."""
        return self.latents

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of pictures, or of their latents."""
        return self.header.latents.shape if self.header.latents else self.shape

    def on(self, device: torch.device) -> Self:
        """The same with its networks on ``device``; this one stays where it is."""
        moved = super().on(device)
        if self.latents is None or self.latents.mean.device == device:
            return moved
        return replace(moved, latents=copy.deepcopy(self.latents).to(device))

    def decoded(self, x: Tensor) -> Tensor:
        """What the reverse process holds, (N, *noise_shape), as pictures (N, C, H, W), nominally in [−1, 1]."""
        return x if self.latents is None else self.latents.decode(x)

    def encoded(self, pictures: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [−1, 1] as the reverse process would hold them, (N, *noise_shape)."""
        return pictures if self.latents is None else self.latents.encode(pictures)

    def denoiser(self, told: Told | None = None) -> Denoiser:
        """The model as a function from a noisy picture and its σ to the clean one, ``told`` what they show."""
        parametrization = Parametrization(self.config.prediction, self.header.sigma_data)
        return Denoiser(
            partial(self.network, **(told or {})),
            self.schedule,
            parametrization,
            # Latents have no range.
            clip=self.latents is None,
            learned_variance=self.config.learned_variance,
            around=(told or {}).get("low"),
        )


def classes_of(config: FamilyConfig, class_histogram: dict[str, int]) -> list[str]:
    """The classes that a network of this configuration is told of: those of the data set, if there are several."""
    return list(class_histogram) if config.conditional and len(class_histogram) > 1 else []


def to_float(pictures: Tensor) -> Tensor:
    """Stored pictures, uint8, as the network sees them: float32 in [−1, 1]."""
    return pictures.float() / 127.5 - 1


def to_uint8(pictures: Tensor) -> Tensor:
    """The network's pictures, nominally in [−1, 1], as uint8; what lies outside is clipped."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Write a safetensors file atomically, ``header`` in its metadata; returns the file's SHA-256."""
    metadata = {METADATA_KEY: canonical_json(header)}
    packed = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        return write_atomically(path, lambda partial: save_file(packed, partial, metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file written by ``save_tensors``; raises UserError if it is none."""
    try:
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > LARGEST_HEADER:
            raise UserError(
                f"{path} is not a model of ours, or is damaged (a header of {size} bytes): train or fetch it again"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = HEADER.validate_json(metadata[METADATA_KEY])
    except FileNotFoundError as error:
        raise UserError(f"no model at {path}: train one with `darkroom train`") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give the file of a model") from error
    except (SafetensorError, KeyError, ValidationError) as error:
        raise UserError(f"{path} is not a model of ours, or is damaged: train or fetch it again") from error
    return header


def export(checkpoint: Path, path: Path) -> str:
    """Write what ``load_model`` needs of a checkpoint to ``path``; returns the new file's SHA-256."""
    with safe_open(checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith((AVERAGED, AUTOENCODER))]  # noqa: SIM118 (no mapping)
        tensors = {name: file.get_tensor(name) for name in names}
    return save_tensors(path, tensors, read_header(checkpoint))


def read_model_header(path: Path) -> ModelHeader:
    """What the model in a file says of itself; raises UserError as ``load_model`` does."""
    raw = read_header(path)
    try:
        header = ModelHeader.model_validate(raw["model_header"])
    except (KeyError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ["model_header"], "msg": "missing"}
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} has a header this version cannot read ({where}: {first['msg']}): use the version that wrote it"
        ) from error
    if header.format_version == 1 and header.model.low_resolution is not None:
        raise UserError(f"{path} enlarges in a way that is no more: use the version that wrote it, or train it again")
    return header


def load_model(path: Path) -> Model:
    """The averaged network of a final model or of a checkpoint, ready to draw from.

    Nothing is unpickled. Raises UserError if the file is missing, damaged or of another format.
    """
    header = read_model_header(path)
    family = family_of(header.model)
    # What the header says of itself takes no memory before the file was seen to hold as much.
    with torch.device("meta"), _ShapesAlone():
        described = _networks(header)
    _require_tensors(path, *described)
    network, autoencoder = _networks(header)
    try:
        network.load_state_dict(_tensors(path, AVERAGED))
        if autoencoder is not None:
            autoencoder.load_state_dict(_tensors(path, AUTOENCODER))
    except RuntimeError as error:  # torch says it in a page; the cause is always the same
        raise _of_another_version(path) from error
    for each in filter(None, (network, autoencoder)):
        each.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model: Model = family.model(header, network, autoencoder)
    return model


class _ShapesAlone(TorchFunctionMode):
    """Inside, what torch loads for seconds to do with tensors without memory leaves their shapes as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _networks(header: ModelHeader) -> tuple[nn.Module, Latents | None]:
    """What ``header`` describes, with random weights: the network, and the autoencoder around it if there is one."""
    shape = header.channels, header.size, header.size
    inner = header.latents.shape if header.latents else shape
    network = family_of(header.model).network(
        header.model, inner, len(classes_of(header.model, header.class_histogram))
    )
    return network, unfilled(header.latents, shape) if header.latents else None


def _require_tensors(path: Path, network: nn.Module, autoencoder: Latents | None) -> None:
    """Raise UserError unless the file holds the tensors of ``network`` and ``autoencoder``, in their shapes."""
    expected = {AVERAGED + name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    if autoencoder is not None:
        expected |= {AUTOENCODER + name: list(tensor.shape) for name, tensor in autoencoder.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith((AVERAGED, AUTOENCODER))]  # noqa: SIM118 (no mapping)
        if {name: file.get_slice(name).get_shape() for name in names} != expected:
            raise _of_another_version(path)


def _of_another_version(path: Path) -> UserError:
    return UserError(
        f"{path} was written by another version of the network, or is damaged: its tensors are not those that its "
        "header describes; load it with the code that its version ships"
    )


def unfilled(space: LatentSpace, shape: tuple[int, int, int]) -> Latents:
    """What leads from pictures of ``shape`` to ``space`` and back, with random weights."""
    moments = torch.zeros(1, space.channels, 1, 1)
    return Latents(VAE(space.autoencoder, shape[0], shape[-1]), moments, moments.clone())


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
