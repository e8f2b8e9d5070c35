"""Import of single-file checkpoints: the weights of a whole pipeline under the names that its authors gave them.

diffusers' ``from_single_file`` renames them, by configurations that lie in a local folder; nothing is fetched.
"""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open

from diffusion.common.errors import DarkroomError, UserError, install_hint
from diffusion.common.files import sha256_file
from diffusion.diffusers_format.import_pipeline import import_pipeline, read_pipeline_class
from diffusion.diffusers_format.safetensors_file import SafetensorsFile
from diffusion.families.header import Origin


def import_single_file(file: SafetensorsFile, config: Path, path: Path, licence: str) -> None:
    """Write the pipeline whose weights are in ``file`` as the model file ``path``, whole or not at all.

    ``config`` is a folder of ``save_pretrained``, whose weights are only read for text encoders that ``file`` lacks.
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
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"there are no single-file checkpoints of a {pipeline}: import a folder of save_pretrained")
    types = {"F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(file.path, framework="pt") as tensors:
        counts = Counter(tensors.get_slice(name).get_dtype() for name in file.names)
    [(most_frequent, _)] = counts.most_common(1) or [("F32", 0)]
    # Beside the result, as the system's temporary folder may be small.
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        try:
            loaded = kind.from_single_file(
                str(file.path),
                config=str(config.resolve()),
                local_files_only=True,
                torch_dtype=types.get(most_frequent, torch.float32),
            )
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
