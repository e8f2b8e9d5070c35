"""Selection of the compute device, CPU or GPU, and bit-for-bit reproducible computation on it."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from diffusion.common.config import DeviceName
from diffusion.common.errors import UserError
from diffusion.common.threads import SharedSettings

CPU_INFO = Path("/proc/cpuinfo")
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that change which instructions torch's libraries use."""


def resolve_device(name: DeviceName) -> torch.device:
    """Resolve a device name; ``LOCAL_RANK`` selects among several GPUs. Raises UserError for cuda without a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise UserError(
            "training.device or sampling.device is cuda, and torch sees no GPU: use auto, or install torch for CUDA"
        )
    if name == "cpu" or not count:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)


def device_name(device: torch.device) -> str:
    """Name the hardware that determines results bit for bit: GPU model, CPU vendor and instruction set."""
    # With a GPU, prompts are still encoded on the CPU.
    return f"{torch.cuda.get_device_name(device)}, {_processor()}" if device.type == "cuda" else _processor()


def has_fast_bf16() -> bool:
    """Return whether oneDNN is faster in bf16 than in fp32: with AMX tiles, or AVX-512's bf16 instructions on AMD.

    In training, fp32 took 1.4 to 1.75 times as long as bf16 on AMD's Zen 5. Other processors run bf16 at half the rate
    of fp32: 158 against 317 GFLOP/s in the largest matrix product (torch 2.13).
    """
    limits = [os.environ[name].upper() for name in ISA_VARIABLES[:2] if name in os.environ]
    amx, avx512 = ("AMX", "DEFAULT"), ("AMX", "AVX10", "FP16", "BF16", "DEFAULT")
    amx_allowed, avx512_allowed = (all(any(isa in limit for isa in isas) for limit in limits) for isas in (amx, avx512))
    on_amd = _vendor(CPU_INFO) == "AuthenticAMD" and torch.cpu._is_avx512_bf16_supported()
    return (torch.cpu._is_amx_tile_supported() and amx_allowed) or (on_amd and avx512_allowed)


@cache
def _vendor(info: Path) -> str:
    match = re.search(r"^vendor_id\s*:\s*(\S+)", info.read_text() if info.is_file() else "", re.MULTILINE)
    return match[1] if match else platform.machine()


def _processor() -> str:
    """Name the CPU's vendor (for MKL), torch's vector instructions, and AMX, which oneDNN uses by itself."""
    tiles = ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    overrides = [f"{name}={os.environ[name]}" for name in ISA_VARIABLES if name in os.environ]
    return ", ".join([_vendor(CPU_INFO), torch.backends.cpu.get_cpu_capability(), *tiles, *overrides])


@contextmanager
def _deterministic() -> Iterator[None]:
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    # Kernels selected by benchmarking differ from run to run.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


_DETERMINISTIC = SharedSettings(_deterministic)


@contextmanager
def compute_deterministically(device: torch.device) -> Iterator[None]:
    """Compute deterministically, as CPUs always do, with float32 matrix products in TF32 on GPUs; for any threads."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads this variable on first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _DETERMINISTIC:
        yield
