"""Import of single-file checkpoints: weights of a pipeline, or its denoiser, by the names that their authors gave them.

diffusers' ``from_single_file`` renames them, by configurations that lie in a local folder; nothing is fetched.
"""

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from diffusion.common.errors import DarkroomError, UserError, install_hint
from diffusion.common.files import sha256_file
from diffusion.diffusers_format.import_pipeline import INDEX, import_pipeline, read_pipeline_class
from diffusion.diffusers_format.safetensors_file import SafetensorsFile
from diffusion.families.header import Origin

PREFIX = "model.diffusion_model."
"""What many tools put before the names of a denoiser."""
OTHERS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")
"""Starts of the names of autoencoders and text encoders."""


def import_single_file(file: SafetensorsFile, config: Path, path: Path, licence: str) -> None:
    """Write the pipeline whose weights are in ``file`` as the model file ``path``, whole or not at all.

    ``config`` is a folder of ``save_pretrained``, whose weights are only read for components that ``file`` lacks.
    Weights get the most frequent type in ``file``. Raises UserError as ``import_pipeline`` does, and if the weights are
    not of such a pipeline.
    """
    pipeline = read_pipeline_class(config)
    try:
        import diffusers
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"the import of a checkpoint needs {error.name}, which is not installed: {install_hint('diffusers')}"
        ) from error
    kind = getattr(diffusers, pipeline)
    transformer = json.loads((config / INDEX).read_bytes()).get("transformer", [None, ""])[1]
    denoiser = getattr(diffusers, transformer, None)
    if denoiser is None or any(name.startswith(OTHERS) for name in file.names):
        denoiser = None  # the file has all of a pipeline
    if not hasattr(denoiser or kind, "from_single_file"):
        raise UserError(f"there are no single-file checkpoints of a {pipeline}: import a folder of save_pretrained")
    types = {"F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(file.path, framework="pt") as tensors:
        counts = Counter(tensors.get_slice(name).get_dtype() for name in file.names)
    [(most_frequent, _)] = counts.most_common(1) or [("F32", 0)]
    # Beside the result, as the system's temporary folder may be small.
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        try:
            options: dict[str, Any] = {
                "local_files_only": True,
                "torch_dtype": types.get(most_frequent, torch.float32),
            }
            folder = str(config.resolve())
            if denoiser is None:
                loaded = kind.from_single_file(str(file.path), config=folder, **options)
            else:
                weights = {name.removeprefix(PREFIX): value for name, value in load_file(file.path).items()}
                part = denoiser.from_single_file(weights, config=folder, subfolder="transformer", **options)
                loaded = kind.from_pretrained(folder, transformer=part, use_safetensors=True, **options)
            loaded.save_pretrained(scratch, safe_serialization=True)
        except (DarkroomError, MemoryError):
            raise
        # Wrong tensors lead to whatever the conversion of each layer meets first.
        except Exception as error:
            words = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{file.path} does not hold the weights of the {pipeline} that {config} describes ({words}): give the "
                "configuration of the model that it was made from"
            ) from error
        import_pipeline(
            Path(scratch),
            path,
            Origin(source=file.path.name, revision=f"sha256:{sha256_file(file.path)}", licence=licence),
        )
