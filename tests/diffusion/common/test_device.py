"""Which GPUs compile a network."""

import logging

import pytest
import torch

from diffusion.common.device import CPU, compiles_by_default

CUDA = torch.device("cuda", 0)


def test_machine_without_a_compiler_warns_and_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not compiles_by_default(CPU)
        assert not caplog.messages
        assert not compiles_by_default(CUDA)
    [message] = caplog.messages
    assert "a C compiler" in message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_gpu_with_a_compiler_compiles() -> None:
    assert compiles_by_default(CUDA)
