"""Networks of imported pipelines of diffusers: denoiser, autoencoder and text encoders as one module.

All classes come from an allow-list and are built from their configurations (``DiffusersConfig``); nothing is loaded by
the libraries themselves but tokenizers, from files that lie in the model's own file.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion.common.errors import UserError, install_hint
from diffusion.models.config import CLIP_TOKENIZERS, SCHEDULERS, T5_TOKENIZERS, Component, DiffusersConfig

TOKENIZERS = (*CLIP_TOKENIZERS, *T5_TOKENIZERS)
T5_LENGTH = 256
"""Tokens of a prompt that Stable Diffusion 3 shows its third text encoder."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names that diffusers had for the layers of an autoencoder's attention, in files from before its version 0.18."""
UNUSED = re.compile(r"(^|\.)position_ids$")
"""Tensors in files of older versions of transformers that are no weights."""
_TOKENIZING = Lock()


class PipelineNetwork(nn.Module):
    """The components of a pipeline that have weights, as sub-modules of their names."""

    class_ids: Tensor
    """The denoiser's number of each class, and of no class."""

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        if config.pipeline is None:
            raise UserError(
                "model.family = diffusers has no network of its own: set training.init_from to an imported pipeline"
            )
        self.files: Mapping[str, bytes] = {}
        """The files of the pipeline that are no weights, by path, of which tokenizers are made."""
        for name, component in config.components.items():
            if component.kind not in (*SCHEDULERS, *TOKENIZERS):
                self.add_module(name, build(component))
        self.register_buffer("class_ids", None, persistent=False)
        self.set_classes(config)

    def set_classes(self, config: DiffusersConfig) -> None:
        """Take the classes of ``config``, which are the network's or some of them."""
        self.config = config
        # After the last class comes no class; without training for it, no request gets there.
        unconditional = (config.network_classes or 0) if config.has_null_class else 0
        self.class_ids = torch.tensor([*config.class_ids, unconditional])

    def component(self, name: str) -> Any:
        """Return the component ``name``."""
        return getattr(self, name)

    @property
    def time_offset(self) -> int:
        """What is added to the times of a schedule, which begin at 0: flow matching has no time without noise."""
        return int(self.config.prediction == "flow_prediction")

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Predict at times from 0 to T−1, as a Darkroom network does; ``draws`` has no effect.

        Args:
            x: Noisy images or latents at unit variance, or (1 − t) x_0 + t ε of flow matching: (N, C, H, W).
            time: (N,) float32.
            label: Numbers in the sorted classes, one more for no class: (N,).
            text: Embedded prompts, (N, E), or for Stable Diffusion their tokens, (N, L) int64.
            draws: Seeds of dropout, which these networks have none of at inference.
        """
        return self.predict(x, time + self.time_offset, label, text)

    def predict(self, x: Tensor, timestep: Tensor, label: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Predict at ``timestep`` of the pipeline's scheduler, a number or (N,); otherwise as ``forward``."""
        network, config = self.component(self.config.denoiser_name), self.config.denoiser.config
        timestep = timestep.expand(len(x))
        inputs: dict[str, Any] = {}
        if text is not None and not text.is_floating_point():
            text = self.component("text_encoder")(text)[0].flatten(1)
            assert text is not None
        match self.config.denoiser.kind:
            case "UNet2DConditionModel":
                assert text is not None
                inputs["encoder_hidden_states"] = torch.unflatten(text, 1, (-1, config["cross_attention_dim"]))
            case "SD3Transformer2DModel":
                assert text is not None
                pooled, width = (config[name] for name in ("pooled_projection_dim", "joint_attention_dim"))
                inputs["encoder_hidden_states"] = torch.unflatten(text[:, :-pooled], 1, (-1, width))
                inputs["pooled_projections"] = text[:, -pooled:]
            case _ if label is not None:
                inputs["class_labels"] = self.class_ids[label]
        prediction: Tensor = network(x, timestep=timestep, **inputs, return_dict=False)[0]
        # Pipelines make no use of DiT's learned variance.
        return prediction[:, : x.shape[1]]

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as means of scaled latents, (N, c, h, w)."""
        autoencoder = self.component(self.config.latents_name)
        output = autoencoder.encode(images)
        z: Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        scale, shift = self._latent_scale
        return (z - shift) * scale

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents (N, c, h, w) to images (N, C, H, W), nominally in [−1, 1]."""
        scale, shift = self._latent_scale
        images: Tensor = self.component(self.config.latents_name).decode(z / scale + shift).sample
        return images.float()

    @property
    def _latent_scale(self) -> tuple[float, float]:
        config = self.component(self.config.latents_name).config
        return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """Embed ``prompt`` as all that the denoiser is shown of it, flat: (E,) float32. An empty one is none."""
        if self.config.pipeline == "StableDiffusionPipeline":
            ids, mask = self._tokens("tokenizer", prompt)
            encoder = self.component("text_encoder")
            uses_mask = getattr(encoder.config, "use_attention_mask", False)
            hidden: Tensor = encoder(ids, attention_mask=mask if uses_mask else None)[0]
            return hidden.flatten().float()
        states, pooled = [], []
        for number in ("", "_2"):
            ids, _ = self._tokens(f"tokenizer{number}", prompt)
            output = self.component(f"text_encoder{number}")(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        joint = torch.cat(states, dim=-1)
        width = self.config.denoiser.config["joint_attention_dim"]
        if "text_encoder_3" in self.config.components:
            ids, _ = self._tokens("tokenizer_3", prompt)
            t5_states = self.component("text_encoder_3")(ids)[0]
        else:
            t5_states = joint.new_zeros(1, T5_LENGTH, width)
        context = torch.cat([pad(joint, (0, width - joint.shape[-1])), t5_states], dim=1)
        return torch.cat([context.flatten(), *(vector.flatten() for vector in pooled)]).float()

    def tokens(self, prompt: str) -> Tensor:
        """Tokenize ``prompt`` for Stable Diffusion's text encoder, padded: (L,) int64."""
        return self._tokens("tokenizer", prompt)[0][0]

    @property
    def embedding_size(self) -> int:
        """Numbers E of an embedded prompt."""
        if self.config.pipeline == "StableDiffusionPipeline":
            return self._length("tokenizer") * int(self.config.denoiser.config["cross_attention_dim"])
        config = self.config.denoiser.config
        tokens = self._length("tokenizer") + T5_LENGTH
        return tokens * int(config["joint_attention_dim"]) + int(config["pooled_projection_dim"])

    def prompt_length(self, prompt: str) -> tuple[int, int]:
        """Count the tokens of ``prompt`` with those at its ends, and the most that are read."""
        name = "tokenizer_3" if "tokenizer_3" in self.config.components else "tokenizer"
        with _TOKENIZING:
            return len(self.tokenizer(name)(prompt, verbose=False).input_ids), self._length(name)

    def tokenizer(self, name: str) -> Any:
        """Make the tokenizer ``name`` of the pipeline's files, once."""
        tokenizers: dict[str, Any] = self.__dict__.setdefault("_tokenizers", {})
        if name not in tokenizers:
            import transformers

            with TemporaryDirectory() as scratch:
                for path, content in self.files.items():
                    folder, _, file = path.rpartition("/")
                    if folder == name:
                        Path(scratch, file).write_bytes(content)
                kind = getattr(transformers, self.config.components[name].kind)
                tokenizers[name] = kind.from_pretrained(scratch, local_files_only=True)
        return tokenizers[name]

    def _tokens(self, name: str, prompt: str) -> tuple[Tensor, Tensor]:
        device = self.class_ids.device
        with _TOKENIZING:
            tokens = self.tokenizer(name)(
                prompt, padding="max_length", max_length=self._length(name), truncation=True, return_tensors="pt"
            )
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def _length(self, name: str) -> int:
        if self.config.components[name].kind in T5_TOKENIZERS:
            return T5_LENGTH
        encoder = self.component(name.replace("tokenizer", "text_encoder"))
        positions = int(encoder.config.max_position_embeddings)
        return min(int(self.tokenizer(name).model_max_length), positions)


def build(component: Component) -> Any:
    """Build the module or scheduler of ``component`` with random weights; raises UserError if it cannot be."""
    try:
        import diffusers
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"a pipeline of diffusers needs {error.name}, which is not installed: {install_hint('diffusers')}"
        ) from error
    try:
        if hasattr(diffusers, component.kind):
            return getattr(diffusers, component.kind).from_config(dict(component.config))
        kind = getattr(transformers, component.kind)
        config = kind.config_class.from_dict(dict(component.config))
        config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
        return kind(config)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        words = str(error).partition("\n")[0]
        raise UserError(
            f"no {component.kind} can be built from its configuration ({words}): is it of another version of diffusers?"
        ) from error


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
        # The text encoder of transformers 5 has no model within the model.
        for candidate in (key, new_key, key.removeprefix("text_model."), f"text_model.{key}"):
            if f"{component}.{candidate}" in tensors:
                mapping[name] = f"{component}.{candidate}"
                break
        else:
            if not UNUSED.search(key):
                mapping[name] = name
    return mapping
