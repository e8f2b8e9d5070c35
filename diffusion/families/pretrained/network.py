"""Networks of imported pipelines of diffusers: denoiser, autoencoder and text encoders as one module.

All classes come from an allow-list and are built from their configurations (``DiffusersConfig``); nothing is loaded by
the libraries themselves but tokenizers, from files that lie in the model's own file.
"""

import copy
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion.common.device import CPU
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes
from diffusion.common.model_files import tensor_bytes
from diffusion.families.pretrained.components import WITHOUT_WEIGHTS, build, load_tokenizer
from diffusion.families.pretrained.config import DiffusersConfig
from diffusion.families.pretrained.placement import Placement, Resident, weight_bytes
from diffusion.families.text_encoder import Encoding

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names that diffusers had for the layers of an autoencoder's attention, in files from before its version 0.18."""
UNUSED = re.compile(r"(^|\.)position_ids$")
"""Tensors in files of older versions of transformers that are no weights."""
HEAD = "lm_head.weight"
"""Weights by which a language model chooses words, in files of text encoders that are loaded without."""
_TOKENIZING = Lock()


class PipelineNetwork(nn.Module):
    """The components of a pipeline that have weights, as sub-modules of their names."""

    class_ids: Tensor
    """The denoiser's number of each class, and of no class."""
    placement: Placement | None = None
    """Copies of the components on the device where they work; None: they are where they work."""
    resident: Resident | None = None
    """What training keeps of the network on its device; None: nothing."""

    def __init__(self, config: DiffusersConfig, names: Collection[str] | None = None) -> None:
        super().__init__()
        if config.pipeline is None:
            raise UserError(
                "model.family = diffusers has no network of its own: set training.init_from to an imported pipeline"
            )
        self.files: Mapping[str, bytes] = {}
        """The files of the pipeline that are no weights, by path, of which tokenizers are made."""
        for name, component in config.components.items():
            if component.kind not in WITHOUT_WEIGHTS and (names is None or name in names):
                self.add_module(name, build(component))
        self.register_buffer("class_ids", None, persistent=False)
        self.set_classes(config)

    def set_classes(self, config: DiffusersConfig) -> None:
        """Take the classes of ``config``, which are the network's or some of them."""
        self.config, self.pipeline = config, config.imported
        # After the last class comes no class; without training for it, no request gets there.
        unconditional = (self.pipeline.network_classes or 0) if self.pipeline.has_null_class else 0
        self.class_ids = torch.tensor([*config.class_ids, unconditional])

    def component(self, name: str) -> Any:
        """Return the component ``name`` where it works, to be used before the next one is taken."""
        component = self.get_submodule(name)
        return component if self.placement is None else self.placement.bring(name, component)

    @property
    def device(self) -> torch.device:
        """Where the components work."""
        return self.class_ids.device

    def on(self, device: torch.device) -> Self:
        """Return the network as it works on ``device``, to which components are copied when they are used."""
        if device == self.device:
            return self
        network = self.select(dict(self.named_children()))
        network.placement = None if device == CPU else Placement(device, self.resident)
        network.register_buffer("class_ids", self.class_ids.to(device), persistent=False)
        return network

    def select(self, names: Iterable[str]) -> Self:
        """Return the network with the components ``names`` alone, which are the same modules."""
        network = copy.copy(self)
        network._modules = {name: self._modules[name] for name in names}
        network._buffers = {**self._buffers}
        return network

    @property
    def time_offset(self) -> int:
        """What is added to the times of a schedule, which begin at 0: flow matching has no time without noise."""
        return int(self.pipeline.prediction == "flow_prediction")

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        draws: Tensor | None = None,
        **conditioning: Tensor,
    ) -> Tensor:
        """Predict at times from 0 to T−1, as a Darkroom network does; ``draws`` has no effect.

        Args:
            x: Noisy images or latents at unit variance, or (1 − t) x_0 + t ε of flow matching: (N, C, H, W).
            time: (N,) float32.
            draws: Seeds of dropout, which these networks have none of at inference.
            conditioning: ``label``, numbers in the sorted classes, one more for no class, (N,), or the tensors that
                ``Pipeline.encode_prompt`` names, of N prompts.
        """
        return self.predict(x, time + self.time_offset, **conditioning)

    def predict(self, x: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        """Predict at ``timestep`` of the pipeline's scheduler, a number or (N,); otherwise as ``forward``."""
        return self.pipeline.predict(self, x, timestep.expand(len(x)), conditioning)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as means of scaled latents, (N, c, h, w)."""
        return self.pipeline.encode(self, images)

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents (N, c, h, w) to images (N, C, H, W), nominally in [−1, 1]."""
        return self.pipeline.decode(self, z)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | None) -> Encoding:
        """Encode ``prompt``, or None for none, as all that the denoiser is shown of it."""
        return self._encode_text(self.pipeline.encode_prompt, prompt)

    @torch.no_grad()
    def encode_negative(self, prompt: str | None) -> Encoding:
        """Encode a negative ``prompt``, or None for none, as all that the denoiser is shown of it."""
        return self._encode_text(self.pipeline.encode_negative, prompt)

    def _encode_text(self, encode: Callable[["PipelineNetwork", str | None], Encoding], prompt: str | None) -> Encoding:
        """Encode ``prompt``, on the CPU if the text encoders are too large for the device."""
        encoders = [part for name, part in self.named_children() if name.startswith("text_encoder")]
        if self.placement is None or self.placement.has_room(sum(map(weight_bytes, encoders))):
            return encode(self, prompt)
        return {name: value.to(self.device) for name, value in encode(self.on(CPU), prompt).items()}

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """Count the tokens of ``prompt`` with those at its ends, and the most that are read."""
        name = self.pipeline.limiting_tokenizer
        with _TOKENIZING:
            text = self.pipeline.prompt_text(prompt)
            added = self.pipeline.adds_special_tokens
            count = len(self.tokenizer(name)(text, verbose=False, add_special_tokens=added).input_ids)
            return count, self.pipeline.tokenizer_length(self, name)

    def tokenizer(self, name: str) -> Any:
        """Make the tokenizer ``name`` of the pipeline's files, once."""
        tokenizers: dict[str, Any] = self.__dict__.setdefault("_tokenizers", {})
        if name not in tokenizers:
            with TemporaryDirectory() as scratch:
                for path, content in self.files.items():
                    folder, _, file = path.rpartition("/")
                    if folder == name:
                        Path(scratch, file).write_bytes(content)
                tokenizers[name] = load_tokenizer(self.config.components[name].kind, Path(scratch))
            if self.pipeline.padding_side is not None:
                tokenizers[name].padding_side = self.pipeline.padding_side
        return tokenizers[name]

    def tokens(self, name: str, prompt: str, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokenize ``prompt`` by the tokenizer ``name``, padded: numbers and mask, (1, L) int64 each.

        With ``length`` L, it is text as the text encoder is to read it.
        """
        with _TOKENIZING:
            text = self.pipeline.prompt_text(prompt) if length is None else prompt
            length = self.pipeline.tokenizer_length(self, name) if length is None else length
            tokens = self.tokenizer(name)(
                text,
                padding="max_length",
                max_length=length,
                truncation=True,
                add_special_tokens=self.pipeline.adds_special_tokens,
                return_tensors="pt",
            )
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)


@dataclass(frozen=True)
class PickledNetwork:
    """A network that is pickled as its configuration and weights: not all modules of libraries can be."""

    network: PipelineNetwork

    def __reduce__(self) -> Any:
        weights = {name: component.state_dict() for name, component in self.network.named_children()}
        return _unpickle, (self.network.config, dict(self.network.files), weights)

    def to(self, device: torch.device) -> PipelineNetwork:
        """Return the network as it works on ``device``."""
        return self.network.on(device)


def _unpickle(
    config: DiffusersConfig, files: Mapping[str, bytes], weights: Mapping[str, Mapping[str, Tensor]]
) -> PickledNetwork:
    network = PipelineNetwork(config, weights)
    network.files = files
    for name, tensors in weights.items():
        network.get_submodule(name).load_state_dict(tensors, assign=True)
    return PickledNetwork(network.eval())


def tensor_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Find the tensor of ``network`` that each of the ``names`` in a file stands for, whatever version wrote it.

    Names that stand for none are left out if they never were weights, and else map to themselves.
    """
    tensors = set(network.state_dict())
    mapping = {}
    for name in names:
        component, _, key = name.partition(".")
        *path, leaf = key.split(".")
        new_key = ".".join([*path[:-1], OLD_ATTENTION.get(path[-1], path[-1]), leaf]) if path else key
        # In transformers 5 CLIP's text encoder has no model within the model, that of Qwen2.5-VL has two, and Mistral 3
        # has them the other way round.
        mistral = key.replace("language_model.model.", "model.language_model."), key.removeprefix("language_model.")
        own = (
            *mistral,
            key.removeprefix("text_model."),
            f"text_model.{key}",
            key.removeprefix("model."),
            f"model.{key}",
        )
        for candidate in (key, new_key, *own, re.sub(r"^model\.", "model.language_model.", key)):
            if f"{component}.{candidate}" in tensors:
                mapping[name] = f"{component}.{candidate}"
                break
        else:
            if not UNUSED.search(key) and key != HEAD:
                mapping[name] = name
    return mapping


def parts_digest(network: PipelineNetwork, *names: str) -> str:
    """SHA-256 over configurations, weights and files of a pipeline's components whose names begin with ``names``."""
    digest = hashlib.sha256()
    for name, component in sorted(network.config.components.items()):
        if name.startswith(names):
            digest.update(canonical_json([name, component.model_dump(mode="json")]).encode())
    for name, value in sorted(network.state_dict().items()):
        if name.startswith(names):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
    for file, content in sorted(network.files.items()):
        if file.startswith(names):
            digest.update(f"{file} {sha256_bytes(content)}".encode())
    return digest.hexdigest()
