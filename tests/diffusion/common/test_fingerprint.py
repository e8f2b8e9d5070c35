"""What the bits of a result depend on is written down."""

import pytest

from diffusion.common.fingerprint import fingerprint


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"])
def test_fingerprint_names_variables_that_change_math_libraries(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable, raising=False)
    usual = fingerprint(64, "fp32", "cpu")
    monkeypatch.setenv(variable, "AVX2")
    named = fingerprint(64, "fp32", "cpu")
    assert usual.differences(named) == f"device: {usual.device} → {usual.device}, {variable}=AVX2"


def test_torch_with_fewer_instructions_is_named_with_the_processor_s_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    there = fingerprint(64, "fp32", "cpu")
    # torch reads ATEN_CPU_CAPABILITY once, when it is imported.
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
    here = fingerprint(64, "fp32", "cpu")
    assert (here.device.split(", ")[0], here == there) == (there.device.split(", ")[0], False)
