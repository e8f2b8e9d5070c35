"""Components of pipelines of diffusers, built from their configurations within limits; loads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from diffusion.common.config import MAX_SIZE, Config
from diffusion.common.errors import UserError, install_hint
from diffusion.families.base import MAX_BLOCKS, MAX_RESOLUTIONS

if TYPE_CHECKING:
    from pathlib import Path

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
CLIP_TOKENIZERS, T5_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of the attention of CLIP's text encoder."""
QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
GEMMA_TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast")
PROCESSORS = ("PixtralProcessor",)
"""Classes that prepare texts and images, of whose files the tokenizer alone is used."""
TOKENIZERS = (*CLIP_TOKENIZERS, *T5_TOKENIZERS, *QWEN_TOKENIZERS, *GEMMA_TOKENIZERS, *PROCESSORS)
WITHOUT_WEIGHTS = (*SCHEDULERS, *TOKENIZERS)
"""Classes of components that are no networks."""
MAX_INTEGER, MAX_LIST, MAX_STRING = 2**18, 2**14, 4096
"""Limits of a component's configuration; files that exceed them are rejected before a network is built."""
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""What libraries raise for values of configurations that they do not check."""
LIMITS = {"sample_size": MAX_SIZE, "pos_embed_max_size": MAX_SIZE, "depth": MAX_BLOCKS * 4, "rope_theta": 2**40}
"""Other limits: lower ones of sizes of whose squares tables are made, and that of a base of rotary embeddings."""


def _within_limits(config: Any, name: str = "", depth: int = 0) -> Any:
    """Return the JSON value ``config``; raises ValueError if it is too large to build a network by."""
    if depth > 4:
        raise ValueError(f"{name} is nested too deeply")
    is_depth = "layers" in name or "blocks" in name
    limit = LIMITS.get(name, MAX_BLOCKS * 4 if is_depth else MAX_INTEGER)
    match config:
        case dict():
            if len(config) > 1000:
                raise ValueError(f"{name or 'it'} has {len(config)} keys")
            for key, value in config.items():
                _within_limits(value, str(key), depth + 1)
        case list() | tuple():
            if len(config) > (MAX_LIST if name == "trained_betas" else MAX_RESOLUTIONS * 8):
                raise ValueError(f"{name} has {len(config)} entries")
            for value in config:
                _within_limits(value, name, depth + 1)
        case str() if len(config) > MAX_STRING:
            raise ValueError(f"{name} has {len(config)} characters")
        case bool() | str() | None:
            pass
        case int() if abs(config) > limit:
            raise ValueError(f"{name} = {config} is beyond {limit}")
        case float() if not abs(config) < 1e30:  # not a number, too
            raise ValueError(f"{name} = {config} is not a finite number")
    return config


class Component(Config):
    """A component of a pipeline: its class and the configuration that it is built by."""

    kind: str
    """Name of the class, one of the allow-list."""
    config: Annotated[dict[str, Any], AfterValidator(_within_limits)] = Field(default_factory=dict)
    """Its configuration, without what begins with an underscore; empty for a tokenizer."""


def text_config(component: Component) -> Any:
    """Make the configuration of a text encoder, with the defaults of its class."""
    import transformers

    return getattr(transformers, component.kind).config_class.from_dict(_without_types(component.config))


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
        kind, config = getattr(transformers, component.kind), text_config(component)
        config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
        return kind(config)
    except FAULTS as error:
        raise UserError(
            f"no {component.kind} can be built from its configuration ({first_line(error)}): is it of another version "
            "of diffusers?"
        ) from error


def _without_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the number formats of weights out, by which some networks would be built in parts."""
    return {
        name: _without_types(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("dtype", "torch_dtype")
    }


def first_line(error: Exception) -> str:
    """Return the first line of what ``error`` says."""
    return str(error).partition("\n")[0]


def load_tokenizer(kind: str, folder: Path) -> Any:
    """Load the tokenizer of the class ``kind`` from the files in ``folder``, none of which is run."""
    import transformers

    name = "PreTrainedTokenizerFast" if kind in PROCESSORS else kind
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True)
