"""What a warm start takes over besides a model: the training state in its checkpoint, and the statistics of its data.

The state is raw weights and optimizer moments, in tensors whose names are as in a checkpoint. A registry keeps it in a
file beside the model's; both together are a checkpoint again.
"""

from pathlib import Path

from safetensors import safe_open

from diffusion.checkpoints import PARTS, content_digest, read_model_header, read_tensors, save_tensors, weights_digest
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from diffusion.common.model_files import read_header

STATE_FILE = "state.safetensors"
"""File of the training state in a run's folder and in a registered model."""
STATISTICS = {"sigma_data", "data_mean", "caption_moments", "latents"}
"""Fields of a model's header about the data that its weights were trained with."""
STATE_OF = "state_of"
"""Key of the header of a file of training state: SHA-256 of the averaged weights that it belongs to."""


def has_state(path: Path) -> bool:
    """Whether the file at ``path`` holds training state, as checkpoints do and models do not."""
    with safe_open(path, framework="pt") as file:
        return any(_is_state(name) for name in file.keys())  # noqa: SIM118 (no mapping)


def start_digest(path: Path) -> str:
    """Compute ``sha256:`` and the SHA-256 over all of the model or checkpoint that decides where a warm start leads."""
    statistics = read_model_header(path).model_dump_json(include=STATISTICS)
    state = {name: value for name, value in read_tensors(path, "").items() if _is_state(name)}
    parts = weights_digest(path), statistics, content_digest(state, {})
    return f"sha256:{sha256_bytes(''.join(parts).encode())}"


def export_state(checkpoint: Path, path: Path) -> bool:
    """Write the training state in ``checkpoint`` to ``path``; returns whether it has any."""
    if not has_state(checkpoint):
        path.unlink(missing_ok=True)
        return False
    tensors = {name: value for name, value in read_tensors(checkpoint, "").items() if _is_state(name)}
    save_tensors(path, tensors, {STATE_OF: weights_digest(checkpoint)})
    return True


def join_state(weights: Path, state: Path, path: Path) -> None:
    """Write the model in ``weights`` and its training ``state`` to ``path`` as one file, which a warm start takes.

    Raises UserError if the state belongs to another model.
    """
    if read_header(state).get(STATE_OF) != weights_digest(weights):
        raise UserError(f"{state} is not the training state of the model in {weights}: delete it, or fetch it again")
    save_tensors(path, read_tensors(weights, "") | read_tensors(state, ""), read_header(weights))


def _is_state(name: str) -> bool:
    return not name.startswith(PARTS)
