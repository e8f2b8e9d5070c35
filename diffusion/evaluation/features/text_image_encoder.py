"""Joint encoders of images and texts, such as CLIP's (arXiv 2103.00020): their cosine says whether these agree.

The weights are the user's: a folder that transformers wrote as safetensors, or two ONNX files. Nothing in it is
unpickled or run, and nothing is downloaded.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from diffusion.common.errors import UserError, install_hint
from diffusion.common.files import digest_of, sha256_file
from diffusion.common.onnx_network import OnnxNetwork, first_line
from diffusion.common.parsing import parse_json
from diffusion.common.shapes import height_and_width
from diffusion.common.threads import worker_threads
from diffusion.evaluation.features.feature_extractor import Extractor

if TYPE_CHECKING:
    from transformers import CLIPModel

MAX_TOKENS = 77
"""Largest number of tokens of a text for an ONNX file that takes any number, as CLIP was trained."""
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of interpolations, as processors name them."""
OPTION = "evaluation.text_image_encoder"


class TextImageEncoder(Extractor):
    """Encoder of images and texts to unit vectors of the same space.

    Images are resized, cropped and normalised as the folder's ``processor_config.json`` (or
    ``preprocessor_config.json``) says; texts are split by its ``tokenizer.json``, each alone and truncated at
    ``max_tokens`` tokens. ``weights``: names of the other files that the embeddings depend on.

    Raises UserError if a file is missing or does not fit.
    """

    max_tokens: int
    """Largest number of tokens of a text, start and end included."""

    def __init__(self, folder: Path, weights: Sequence[str]) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise UserError(
                f"{OPTION} reads captions by tokenizers, which is not installed: {install_hint('text')}"
            ) from error
        self.folder = folder
        name = next((processor for processor in PROCESSORS if (folder / processor).is_file()), PROCESSORS[-1])
        self._read_processor(name)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no class of its own
            raise UserError(
                f"{OPTION} = {folder} has no tokenizer.json that tokenizers can read ({first_line(error)}): save the "
                "encoder's processor there (CLIPProcessor.save_pretrained)"
            ) from error
        self.digest = digest_of({file: sha256_file(folder / file) for file in (*weights, "tokenizer.json", name)})
        self.name = f"clip_{self.digest[:8]}"
        self.about = f"the text-image encoder in {folder.name}, images at {self.crop} pixels"

    def _read_processor(self, name: str) -> None:
        """Read the preprocessing of images from the file ``name``."""
        try:
            spec = parse_json((self.folder / name).read_bytes())
            spec = spec.get("image_processor", spec)
            size, crop = (spec[key] for key in ("size", "crop_size"))
            size = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
            self.crop = int(crop if isinstance(crop, int) else crop["height"]) if spec["do_center_crop"] else int(size)
            self.size, self.resampling = int(size), INTERPOLATIONS[spec["resample"]]
            mean, std = (torch.tensor(spec[key], dtype=torch.float32) for key in ("image_mean", "image_std"))
            self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)
            if not 1 <= self.crop <= self.size <= MAX_IMAGE_SIZE:
                raise ValueError(f"size {self.size}, crop_size {self.crop}")
        except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.folder / name} does not say how CLIP's images are prepared ({first_line(error)}): save the "
                "encoder's processor there (CLIPProcessor.save_pretrained)"
            ) from error
        self.preprocessing = f"RGB, {self.size} px, antialiased {self.resampling}, cropped to {self.crop} px; length 1"

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed ``texts``, each by itself: (len(texts), D) float32 of length 1."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_tokens)
        compute = partial(self._embed, self.network)
        with worker_threads() as pool:
            return torch.cat(list(pool.map(compute, texts)))

    @torch.inference_mode()
    def _embed(self, network: Any, text: str) -> Tensor:
        # JSON may hold lone surrogates, which cannot be encoded.
        ids = self.tokenizer.encode(text.encode(errors="ignore").decode()).ids
        return normalize(self._embed_tokens(network, torch.tensor([ids])))

    @torch.inference_mode()
    def _features(self, network: Any, images: Tensor) -> Tensor:
        """Embed ``images``, (N, 1 or 3, H, W) uint8: (N, D) float32 of length 1."""
        x = images.expand(-1, 3, -1, -1).float()
        if height_and_width(x) != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode=self.resampling, antialias=True).round().clamp(0, 255)
        edge = round((self.size - self.crop) / 2)
        x = x[..., edge : edge + self.crop, edge : edge + self.crop]
        return normalize(self._embed_pixels(network, (x / 255 - self.mean) / self.std))

    @abstractmethod
    def _embed_pixels(self, network: Any, x: Tensor) -> Tensor:
        """Compute the embeddings, (N, D), of prepared images (N, 3, crop, crop)."""

    @abstractmethod
    def _embed_tokens(self, network: Any, ids: Tensor) -> Tensor:
        """Compute the embedding, (1, D), of the tokens ``ids``, (1, L) int64."""


PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Names of the file that says how images are prepared: of transformers 5, and of versions before."""
MAX_IMAGE_SIZE = 4096
"""Largest size of a processor's images, in pixels."""


class CLIP(TextImageEncoder):
    """CLIP as transformers' ``CLIPModel.save_pretrained`` and its processor write it into one folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import CLIPConfig
        except ModuleNotFoundError as error:
            raise UserError(
                f"{OPTION} = {folder} is read by transformers, which is not installed: {install_hint('diffusers')}"
            ) from error
        super().__init__(folder, ("config.json", "model.safetensors"))
        try:
            fields = parse_json((folder / "config.json").read_bytes())
            if fields.get("model_type") != "clip":
                raise ValueError(f"model_type {fields.get('model_type')!r}")
            # Other fields could name code or weights that lie elsewhere.
            self.config = CLIPConfig.from_dict(
                {name: fields[name] for name in ("text_config", "vision_config", "projection_dim") if name in fields}
            )
            text: Any = self.config.text_config
            self.max_tokens, end_id = text.max_position_embeddings, text.eos_token_id
            ids = self.tokenizer.encode("a").ids
            # The network reads the text at its last token; 2 stands for the largest one in configurations of old.
            if max(ids) >= text.vocab_size or ids[-1] != (max(ids) if end_id == 2 else end_id):
                raise ValueError("its tokenizer.json belongs to another model")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / 'config.json'} is not a CLIPModel's ({first_line(error)}): save the model there with "
                "CLIPModel.save_pretrained, or export it to ONNX"
            ) from error

    @cached_property
    def network(self) -> "CLIPModel":
        """Return the network with its weights; raises UserError if they are not its own."""
        from transformers import CLIPModel

        path = self.folder / "model.safetensors"
        try:
            weights = {name: value.float() for name, value in load_file(path).items() if value.is_floating_point()}
            output: Any = CLIPModel.from_pretrained(
                None, config=self.config, state_dict=weights, attn_implementation="sdpa", output_loading_info=True
            )
        except Exception as error:  # safetensors and transformers raise many
            raise UserError(f"{path} holds no weights of a CLIPModel ({first_line(error)}): save it again") from error
        network, info = output
        if keys := sorted(info["missing_keys"]):
            raise UserError(f"{path} lacks {keys[0]} of the CLIPModel that config.json describes: save it again")
        return network.eval().requires_grad_(False)  # type: ignore[no-any-return]

    def _embed_pixels(self, network: "CLIPModel", x: Tensor) -> Tensor:
        embedding: Tensor = network.visual_projection(network.vision_model(pixel_values=x).pooler_output)
        return embedding

    def _embed_tokens(self, network: "CLIPModel", ids: Tensor) -> Tensor:
        embedding: Tensor = network.text_projection(network.text_model(input_ids=ids).pooler_output)
        return embedding


VISION, TEXT = "vision_model.onnx", "text_model.onnx"


class OnnxTextImageEncoder(TextImageEncoder):
    """Two networks in ONNX, named as Hub repositories name them: ``vision_model.onnx`` and ``text_model.onnx``.

    They lie in ``folder`` or in its sub-folder ``onnx``. The first maps float32 images (N, 3, S, S) to ``image_embeds``
    (N, D), the second ``input_ids`` (1, L), with an ``attention_mask`` if it takes one, to ``text_embeds`` (1, D); an
    output of another name counts if it is the only one. A text is padded by its last token where L is fixed.
    """

    def __init__(self, folder: Path, subfolder: str) -> None:
        super().__init__(folder, (f"{subfolder}{VISION}", f"{subfolder}{TEXT}"))
        vision_path, text_path = folder / f"{subfolder}{VISION}", folder / f"{subfolder}{TEXT}"
        vision, text = (OnnxNetwork(path, path.read_bytes()) for path in (vision_path, text_path))
        self.network = vision, text
        pixels = vision.session.get_inputs()
        self.inputs = {value.name: value for value in text.session.get_inputs()}
        if (
            len(pixels) != 1
            or pixels[0].type != "tensor(float)"
            or len(pixels[0].shape) != 4
            or isinstance(pixels[0].shape[0], int)
            or any(isinstance(side, int) and side != self.crop for side in pixels[0].shape[2:])
        ):
            raise _unfit_error(
                vision_path, f"any number of float32 images (N, 3, {self.crop}, {self.crop}) and nothing else"
            )
        ids = self.inputs.get("input_ids")
        if ids is None or len(ids.shape) != 2 or self.inputs.keys() - {"input_ids", "attention_mask"}:
            raise _unfit_error(text_path, "input_ids (1, L), with attention_mask or without, and nothing else")
        self.padded = isinstance(ids.shape[1], int)
        self.max_tokens = ids.shape[1] if self.padded else MAX_TOKENS
        self.outputs = [_output(vision, "image_embeds"), _output(text, "text_embeds")]

    def _embed_pixels(self, network: tuple[OnnxNetwork, OnnxNetwork], x: Tensor) -> Tensor:
        vision = network[0]
        (embedding,) = vision.run([self.outputs[0]], {vision.session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(embedding)

    def _embed_tokens(self, network: tuple[OnnxNetwork, OnnxNetwork], ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        if self.padded:
            padding = self.max_tokens - ids.shape[1]
            ids = torch.cat([ids, ids[:, -1:].expand(1, padding)], 1)
            mask = torch.cat([mask, mask.new_zeros(1, padding)], 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        kinds = {"tensor(int32)": torch.int32, "tensor(int64)": torch.int64}
        feed = {name: inputs[name].to(kinds[value.type]).numpy() for name, value in self.inputs.items()}
        (embedding,) = network[1].run([self.outputs[1]], feed)
        return torch.from_numpy(embedding)


def _output(network: OnnxNetwork, name: str) -> str:
    """Return the name of the output with the embeddings: ``name``, or the only one."""
    ranks = {value.name: len(value.shape) for value in network.session.get_outputs()}
    output = name if len(ranks) > 1 else next(iter(ranks))
    if ranks.get(output) != 2:
        raise UserError(f"{network.path} has no output {name} (N, D): export it again, with the projection")
    return output


def _unfit_error(path: Path, expected: str) -> UserError:
    return UserError(f"{path} does not take {expected}: export it again so")


def open_text_image_encoder(folder: Path) -> TextImageEncoder:
    """Open the encoder in ``folder``: safetensors of transformers, else ONNX; UserError if there is neither."""
    if (folder / "model.safetensors").is_file():
        return CLIP(folder)
    for subfolder in ("", "onnx/"):
        if all((folder / subfolder / name).is_file() for name in (VISION, TEXT)):
            return OnnxTextImageEncoder(folder, subfolder)
    pickle_path = next(iter(sorted(folder.glob("*.bin"))), None)
    raise UserError(
        f"{OPTION} = {folder} has neither model.safetensors nor {VISION} and {TEXT}"
        + (f", and {pickle_path.name} is a pickle, which is not read here" if pickle_path else "")
        + ": save a model there with CLIPModel.save_pretrained and its CLIPProcessor.save_pretrained"
    )
