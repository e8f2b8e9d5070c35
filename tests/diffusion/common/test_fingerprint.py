"""What the bits of a result depend on is written down."""

from pathlib import Path

import pytest

from diffusion.common.fingerprint import describe_precision, fingerprint


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"])
def test_fingerprint_names_variables_that_change_math_libraries(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable, raising=False)
    usual = fingerprint(64, "fp32", "cpu")
    monkeypatch.setenv(variable, "AVX2")
    first_fingerprint = fingerprint(64, "fp32", "cpu")
    assert usual.differences(first_fingerprint) == f"device: {usual.device} → {usual.device}, {variable}=AVX2"


def test_torch_with_fewer_instructions_is_named_with_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    there = fingerprint(64, "fp32", "cpu")
    # torch reads ATEN_CPU_CAPABILITY once, when it is imported.
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
    here = fingerprint(64, "fp32", "cpu")
    assert (here.device.split(", ")[0], here == there) == (there.device.split(", ")[0], False)


@pytest.mark.parametrize(
    ("vendor", "amx", "limit", "precision"),
    [
        ("GenuineIntel", False, None, "fp32"),
        ("GenuineIntel", True, None, "bf16"),
        ("GenuineIntel", True, "AVX2", "fp32"),
        ("GenuineIntel", True, "AVX512_CORE_BF16", "fp32"),
        ("GenuineIntel", True, "AVX512_CORE_AMX", "bf16"),
        ("AuthenticAMD", False, None, "bf16"),
        ("AuthenticAMD", False, "avx512_core_bf16", "bf16"),
        ("AuthenticAMD", False, "AVX512_CORE", "fp32"),
        ("AuthenticAMD", False, "AVX2", "fp32"),
    ],
)
def test_auto_takes_bf16_on_cpus_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, amx: bool, limit: str | None, precision: str
) -> None:
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr("diffusion.common.device.CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert fingerprint(64, "auto", "cpu").precision == precision
    assert describe_precision("auto").startswith(precision)
