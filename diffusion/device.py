"""Where the network computes: on the processor, or on a GPU."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusion.config import DeviceName
from diffusion.errors import UserError

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


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, ``device`` computes the same bits each time, and products of float32 with the GPU's tensor cores (TF32).

    A processor does so anyway.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    products, strict = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    try:
        # Kernels chosen by timing differ from run to run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(strict)
