"""Where the network computes: on the processor, or on a GPU."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

import torch

from diffusion.common.config import DeviceName
from diffusion.common.errors import UserError

PROCESSORS = Path("/proc/cpuinfo")
CHANGE_BITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Variables that give the libraries below torch other instructions than they would take."""


def resolve_device(name: DeviceName) -> torch.device:
    """``auto`` is a GPU where torch sees one, and the processor elsewhere; of several GPUs, each process has its own.

    Raises UserError if there is no GPU, and one was asked for.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise UserError(
            "training.device or sampling.device is cuda, and torch sees no GPU: use auto, or install torch for CUDA"
        )
    if name == "cpu" or not count:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)


def device_name(device: torch.device) -> str:
    """What decides the bits that ``device`` computes: a GPU's model, and the processor's maker and instructions."""
    # Beside a GPU the processor reads prompts.
    return f"{torch.cuda.get_device_name(device)}, {_processor()}" if device.type == "cuda" else _processor()


def _processor() -> str:
    """torch names its own vector instructions; oneDNN takes AMX by itself, and MKL asks who made the processor."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", PROCESSORS.read_text() if PROCESSORS.is_file() else "", re.MULTILINE)
    tiles = ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    asked = [f"{name}={os.environ[name]}" for name in CHANGE_BITS if name in os.environ]
    maker = found[1] if found else platform.machine()
    return ", ".join([maker, torch.backends.cpu.get_cpu_capability(), *tiles, *asked])


class _Strict:
    """Torch computes the same bits each time as long as anybody is inside, in whatever thread.

    Its switches are the process's, which several at a time cannot each put back: the last one does.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                self._before.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
                torch.set_float32_matmul_precision("high")
                torch.use_deterministic_algorithms(True)
                # Kernels chosen by timing differ from run to run.
                self._before.enter_context(
                    torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
                )
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()


_STRICT = _Strict()


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, ``device`` computes the same bits each time, and products of float32 with the GPU's tensor cores (TF32).

    A processor does so anyway. Any number of threads may be inside.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _STRICT:
        yield
