"""Compute environment that determines results bit for bit, besides configuration, data and seed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import Field

from diffusion.common.config import Config, DeviceName
from diffusion.common.device import CPU, device_name, has_fast_bf16, resolve_device

Precision = Literal["auto", "bf16", "fp32"]


class Fingerprint(Config):
    """Settings on which floating-point sums depend: with equal fingerprints, equal inputs give equal bits."""

    batch: int
    """Images per compute batch."""
    precision: Literal["bf16", "fp32"]
    """Number format of the network's matrix products."""
    threads: Literal[1] = 1
    """Threads per operation: see ``diffusion.common.threads``."""
    device: str
    """CPU vendor and instruction set, and the GPU model if there is one."""
    torch: str
    """Version of torch."""
    compile: bool = False
    """Whether the network was compiled."""
    ranks: int = Field(1, exclude_if=lambda count: count == 1)
    """Number of training processes that shared each batch."""
    shard: int = Field(1, exclude_if=lambda count: count == 1)
    """Number of processes that shared the network."""

    def differences(self, other: "Fingerprint") -> str:
        """List the fields that differ, as ``field: this → that``; empty if none do."""
        before, after = dict(self), dict(other)
        return ", ".join(f"{name}: {before[name]} → {after[name]}" for name in before if before[name] != after[name])


def resolve_precision(precision: Precision, device: torch.device = CPU) -> Literal["bf16", "fp32"]:
    """Resolve a precision: ``auto`` is bf16 on GPUs that support it and on CPUs that are faster in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device) else "fp32"


def describe_precision(precision: Precision, device: torch.device = CPU) -> str:
    """Name the resolved precision and why it was chosen."""
    number_format = resolve_precision(precision, device)
    if precision != "auto":
        return f"{number_format}, as configured"
    reasons = {"bf16": "the CPU has fast bf16 instructions", "fp32": "the CPU has no fast bf16 instructions"}
    if device.type != "cpu":
        reasons = {"bf16": "the GPU supports it", "fp32": "the GPU has no bf16"}
    return f"{number_format}, as {reasons[number_format]}"


def autocast(precision: Precision, device: torch.device = CPU) -> AbstractContextManager[object]:
    """Create the autocast context for ``precision`` on ``device``."""
    if resolve_precision(precision, device) == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def fingerprint(batch: int, precision: Precision, device: DeviceName) -> Fingerprint:
    """Make the fingerprint of this process for compute batches of ``batch`` images."""
    where = resolve_device(device)
    return Fingerprint(
        batch=batch, precision=resolve_precision(precision, where), device=device_name(where), torch=torch.__version__
    )
