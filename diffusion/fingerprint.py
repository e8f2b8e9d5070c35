"""What the bits of a result depend on besides configuration, data and seed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from diffusion.config import Config

Precision = Literal["auto", "bf16", "fp32"]


class Fingerprint(Config):
    """Within an equal fingerprint equal inputs give equal bits; floating-point sums change with each field."""

    batch: int
    """Pictures per compute batch."""
    precision: Literal["bf16", "fp32"]
    """Number format of the network's matrix products."""
    threads: Literal[1] = 1
    """Threads per operation: see ``diffusion.lanes``."""
    device: str
    """The processor's vector instructions as torch names them."""
    torch: str
    """Version of torch."""
    compile: bool = False
    """Whether the network was compiled."""

    def differences(self, other: "Fingerprint") -> str:
        """What differs, as ``field: this → that``; empty if nothing does."""
        mine, theirs = self.model_dump(), other.model_dump()
        return ", ".join(f"{name}: {mine[name]} → {theirs[name]}" for name in mine if mine[name] != theirs[name])


def resolve_precision(precision: Precision) -> Literal["bf16", "fp32"]:
    """``auto`` is bf16 where the processor multiplies it natively, and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """The context in which the network computes in ``precision``."""
    if resolve_precision(precision) == "bf16":
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def fingerprint(batch: int, precision: Precision) -> Fingerprint:
    """The fingerprint of this process for compute batches of ``batch`` pictures."""
    return Fingerprint(
        batch=batch,
        precision=resolve_precision(precision),
        device=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
    )
