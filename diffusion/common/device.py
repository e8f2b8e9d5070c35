"""All that depends on the kind of compute device, CPU or GPU: its choice, copies, memory, bit-for-bit results."""

import logging
import os
import platform
import re
import resource
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from diffusion.common.config import DeviceName
from diffusion.common.errors import UserError
from diffusion.common.threads import SharedSettings

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
CPU_INFO = Path("/proc/cpuinfo")
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that change which instructions torch's libraries use."""


def resolve_device(name: DeviceName) -> torch.device:
    """Resolve a device name; ``LOCAL_RANK`` selects among several GPUs. Raises UserError for cuda without a GPU.

    Without CUDA, auto is also the accelerator of a backend that another package has added to torch (PrivateUse1).
    """
    kinds = {"cpu": (), "cuda": ("cuda",), "auto": ("cuda", torch._C._get_privateuse1_backend_name())}
    for kind in kinds[name]:
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available() and (count := backend.device_count()):
            return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % count)
    if name == "cuda":
        raise UserError(
            "training.device or sampling.device is cuda, and torch sees no GPU: use auto, or install torch for CUDA"
        )
    return CPU


def device_name(device: torch.device) -> str:
    """Name the hardware that determines results bit for bit: GPU model, CPU vendor and instruction set."""
    # With a GPU, the CPU encodes the prompts of text encoders that are too large for it.
    names = [] if device.type == "cpu" else [torch.get_device_module(device).get_device_name(device)]
    return ", ".join([*names, _processor()])


def set_current_device(device: torch.device) -> None:
    """Make ``device`` the current one of this thread, among several GPUs."""
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)


def free_memory(device: torch.device) -> int:
    """Measure the bytes of memory that are free on a GPU, or that torch holds there and does not use."""
    module = torch.get_device_module(device)
    free: int = module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device)
    return free


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that a GPU has."""
    total: int = torch.get_device_module(device).mem_get_info(device)[1]
    return total


def peak_memory(device: torch.device) -> int:
    """Measure the most bytes that tensors of this process have taken on a GPU; on a CPU, all that the process has."""
    if device.type != "cpu":
        peak: int = torch.get_device_module(device).max_memory_allocated(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a ``tensor`` of the CPU to ``device`` without waiting for it; returns one that is there already."""
    # Copies from pinned memory alone do not wait for all that a GPU has yet to do.
    return tensor if tensor.device == device else tensor.pin_memory().to(device, non_blocking=True)


class CopyToCPU:
    """Copy of a tensor to the CPU, which a GPU makes when it gets there, while this process goes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to(CPU, non_blocking=True)
        self._made = None
        if tensor.device.type != "cpu":
            self._made = torch.get_device_module(tensor.device).current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """Return the copy once it is made."""
        if self._made is not None:
            self._made.synchronize()
        return self._copy


def collective_backends() -> str:
    """Name the backends of collectives between processes, for each kind of device."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def compiles_by_default(device: torch.device) -> bool:
    """Whether a compiled network is worth the time that compilation takes: on GPUs with CUDA that Triton supports.

    Triton compiles a launcher in C for each kernel; where it cannot, a warning says what is missing.
    """
    if device.type != "cuda":
        return False
    missing = [] if has_triton() else ["Triton"]
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        missing.append("a C compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("the headers of Python (python3-dev)")
    if missing:
        logger.warning("the network is not compiled, which takes longer: install %s", " and ".join(missing))
    return not missing


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether ``device`` is faster in bf16 than in fp32.

    On a CPU whether oneDNN is: with AMX tiles, or AVX-512's bf16 instructions on AMD. In training, fp32 took 1.4 to
    1.75 times as long as bf16 on AMD's Zen 5. Other processors run bf16 at half the rate of fp32: 158 against
    317 GFLOP/s in the largest matrix product (torch 2.13).
    """
    if device.type == "cuda":
        is_supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_supported
    if device.type != "cpu":
        return False
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
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    # It would launch a kernel for each new tensor.
    settings.fill_uninitialized_memory = False
    # Kernels selected by benchmarking differ from run to run.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield
    settings.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


_DETERMINISTIC = SharedSettings(_deterministic)


@contextmanager
def compute_deterministically(device: torch.device) -> Iterator[None]:
    """Compute deterministically, as CPUs always do, with float32 matrix products in TF32 on GPUs; for any threads."""
    if device.type != "cuda":
        yield
        return
    # Read at the first product of matrices on CUDA in a process, which is too late if it was made before.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _DETERMINISTIC:
        yield
