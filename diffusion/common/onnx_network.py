"""Networks in ONNX files, which are data: graphs of onnxruntime's own operators, within limits of memory."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.common.errors import UserError, install_hint
from diffusion.common.threads import cores

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MAX_THREAD_BYTES = 2 * 2**30
"""Memory of weights and activations for each thread that computes, and as much again for what they share, in bytes."""


class OnnxNetwork:
    """The network in ``data``, the bytes of the ONNX file ``path``; raises UserError if it cannot run."""

    def __init__(self, path: Path, data: bytes) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise UserError(
                f"ONNX files are read by onnxruntime, which is not installed: {install_hint('onnx')}"
            ) from error
        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # threads compute in parallel
        options.log_severity_level = 4  # errors come as exceptions
        _limit_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        with tempfile.TemporaryDirectory() as empty_folder:
            # External weight files would not be covered by the digest, so they are disabled.
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", empty_folder)
            try:
                self.session: InferenceSession = onnxruntime.InferenceSession(
                    data, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's many errors have no base of their own
                raise UserError(
                    f"{path} is not an ONNX network that onnxruntime {onnxruntime.__version__} can run "
                    f"({first_line(error)}): export it again, all in one file"
                ) from error

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Compute ``outputs``, by default all; raises UserError if the network fails or exceeds its memory."""
        try:
            return list(self.session.run(outputs, dict(inputs)))
        except Exception as error:  # as above
            raise UserError(f"the network in {self.path} cannot run ({first_line(error)}): use another one") from error


@cache
def _limit_memory() -> None:
    """Bound the memory of all sessions of this process: a file of 200 bytes may hold a constant of any size."""
    import onnxruntime

    arena = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limits = onnxruntime.OrtArenaCfg({"max_mem": MAX_THREAD_BYTES * (cores() + 1)})
    onnxruntime.create_and_register_allocator(arena, limits)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or else its class."""
    return str(error).partition("\n")[0] or type(error).__name__
