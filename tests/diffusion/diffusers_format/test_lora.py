"""LoRA as other tools have it: names, α and images, against diffusers and peft, out of Darkroom and into it."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_base import _pack_dict_with_prefix
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.checkpoints import AVERAGED, load_model, read_model_header, read_tensors
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.model_files import MAX_HEADER_BYTES
from diffusion.diffusers_format.adapter import AdapterDetails, export_adapter
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.diffusers_format.import_model import ImportParts, import_file
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.adapters.base import AdapterFormat
from diffusion.families.header import Origin
from diffusion.process.samplers import sampling_config
from tests.builders import pipelines
from tests.builders.adapters import write_adapter

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Folder and model file of a tiny pipeline, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            folder, base = pipelines.MAKERS[kind](root / "pipeline"), root / "base.safetensors"
            import_pipeline(folder, base, Origin(source="tiny", licence="openrail"))
            made[kind] = folder, base
        return made[kind]

    return make


@pytest.fixture
def base(bases: Callable[[str], tuple[Path, Path]]) -> Path:
    return bases("stable_diffusion")[1]


def images(folder: Path, lora: Path | None = None) -> Tensor:
    """Images of diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    generator = torch.Generator().manual_seed(3)
    result: Tensor = pipe(
        "a red circle", generator=generator, num_inference_steps=3, output_type="pt", guidance_scale=3.0
    ).images
    return result


def exported(final: Path, folder: Path, file_format: AdapterFormat, **details: Any) -> Path:
    result = export_adapter(final, folder, file_format=file_format, details=AdapterDetails(**details))
    return folder / next(name for name in result.files if name.endswith(".safetensors"))


def imported(file: Path, base: Path, path: Path, licence: str | None = "CC0-1.0") -> Path:
    return import_file(str(file), path, licence, path.parent, parts=ImportParts(base=base)).file


def assert_equal_weights(actual: Path, expected: Path, tolerance: float = 0.0) -> None:
    written, reference = (load_model(path).network.state_dict() for path in (actual, expected))
    for name, value in reference.items():
        torch.testing.assert_close(written[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("kind", "file_format"),
    [("stable_diffusion", "diffusers"), ("stable_diffusion", "kohya"), ("stable_diffusion_3", "diffusers")],
)
def test_diffusers_draws_the_images_of_the_merged_pipeline(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path, kind: str, file_format: AdapterFormat
) -> None:
    folder, base = bases(kind)
    is_sd = kind == "stable_diffusion"
    final = write_adapter(tmp_path / "final.safetensors", base, 0.25 if is_sd else 1.0, text_encoder=is_sd)
    export_to_diffusers(final, tmp_path / "merged", sampling_config(steps=2))
    expected = images(tmp_path / "merged")
    actual = images(folder, exported(final, tmp_path / "out", file_format))
    assert (actual - images(folder)).abs().max() > 0.02
    assert (actual - expected).abs().max() < (2e-6 if is_sd else 1e-4)


def test_kohya_names_are_those_of_diffusers_converters(base: Path, tmp_path: Path) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base, text_encoder=True)
    written = load_file(exported(final, tmp_path / "zwx", "kohya"))
    # The other way round they are understood, and say α.
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(written))
    assert set(alphas.values()) == {3.0}
    assert len(alphas) == len(written) / 3
    assert {name.partition(".")[0] for name in converted} == {"unet", "text_encoder"}
    # Their own converter has the same names of the denoiser, and of a text encoder those before transformers 5.
    factors = read_tensors(final, AVERAGED)
    reference = convert_state_dict_to_kohya(factors)
    renamed = {
        name.replace("lora_te1_encoder", "lora_te_text_model_encoder").replace("lora_te1", "lora_te")
        for name in reference
    }
    assert set(written) == renamed
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.") for name in written)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert torch.equal(written[f"{name}.lora_up.weight"], reference[f"{name}.lora_up.weight"])


def test_text_encoders_of_several_are_numbered(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, base = bases("stable_diffusion_3")
    layers = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (32, 16),
        "transformer.transformer_blocks.0.attn.add_q_proj": (16, 16),
    }
    tensors = {}
    for name, (out, inner) in layers.items():
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, inner), f"{name}.lora_B.weight": torch.randn(out, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    final = imported(tmp_path / "in.safetensors", base, tmp_path / "model" / "final.safetensors")
    keys = {name.partition(".")[0] for name in load_file(exported(final, tmp_path / "out", "kohya"))}
    assert keys == {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1",
        "lora_transformer_transformer_blocks_0_attn_add_q_proj",
    }
    again = imported(tmp_path / "out" / "out.safetensors", base, tmp_path / "again" / "final.safetensors")
    assert_equal_weights(again, final)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_metadata_names_what_tools_show(base: Path, tmp_path: Path, file_format: AdapterFormat) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base, version="models:/painter/1")
    details = {"title": "Circles, drawn", "trigger": "zwx", "licence": "CC-BY-4.0"}
    file = exported(final, tmp_path / "out", file_format, **details)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    data = file.read_bytes()
    content = data[8 + int.from_bytes(data[:8], "little") :]
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "Circles, drawn",
        "modelspec.trigger_phrase": "zwx",
        "modelspec.resolution": "16x16",
        "modelspec.license": "CC-BY-4.0",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(content).hexdigest()}",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "models:/painter/1",
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0" if file_format == "kohya" else "2.0",
        "ss_resolution": "(16, 16)",
    }
    assert {key: metadata[key] for key in expected} == expected
    # The library itself would write the keys in another order each time.
    assert exported(final, tmp_path / "out", file_format, **details) == file
    assert sha256_file(exported(final, tmp_path / "again" / "out", file_format, **details)) == sha256_file(file)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_an_exported_adapter_comes_back(base: Path, tmp_path: Path, file_format: AdapterFormat) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base, text_encoder=True)
    file = exported(final, tmp_path / "zwx", file_format)
    back = imported(file, base, tmp_path / "back" / "final.safetensors", None)
    before, after = read_model_header(final), read_model_header(back)
    assert before.adapter is not None
    assert after.adapter is not None
    if file_format == "kohya":
        assert (after.adapter.rank, after.adapter.alpha, after.adapter.text_encoder) == (2, 3, True)
        assert_equal_weights(back, final)
    assert_equal_weights(back, final, 1e-7)
    assert after.base == before.base
    assert after.origin is not None
    assert (after.origin.licence, after.origin.files) == ("openrail", {file.name: sha256_file(file)})


def test_an_adapter_that_diffusers_saved_keeps_its_alpha(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, base = bases("stable_diffusion")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_v", "proj_in", "conv1"]
    )
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=_collate_lora_metadata({"unet": pipe.unet})["unet_lora_adapter_metadata"],
    )
    [file] = (tmp_path / "lora").glob("*.safetensors")
    final = imported(file, base, tmp_path / "model" / "final.safetensors")
    lora = read_model_header(final).adapter
    assert lora is not None
    assert (lora.rank, lora.alpha) == (4, 6)
    export_to_diffusers(final, tmp_path / "merged", sampling_config(steps=2))
    expected = images(folder, file)
    assert (expected - images(folder)).abs().max() > 0.005
    assert (images(tmp_path / "merged") - expected).abs().max() < 2e-6


def _rename(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


def _attention_processors(tensors: Tensors) -> Tensors:
    """The first format of diffusers, in which the processors of attention had the matrices."""
    result = _rename(tensors, (".lora_A.", "_lora.down."), (".lora_B.", "_lora.up."), ("to_out.0", "to_out"))
    return _rename(result, ("attn1.", "attn1.processor."), ("attn2.", "attn2.processor."), ("unet.", ""))


CONVENTIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "peft": lambda tensors: {f"base_model.model.{name}": value for name, value in tensors.items()},
    "diffusers 0.17": lambda tensors: _rename(tensors, (".lora_A.", ".lora.down."), (".lora_B.", ".lora.up.")),
    "linear layers": lambda tensors: _rename(
        tensors, (".lora_A.", ".lora_linear_layer.down."), (".lora_B.", ".lora_linear_layer.up.")
    ),
    "attention processors": _attention_processors,
    "half precision": lambda tensors: {name: value.half() for name, value in tensors.items()},
    "flat convolutions": lambda tensors: {name: value.flatten(1) for name, value in tensors.items()},
}


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_other_names_of_the_same_layers_are_known(base: Path, tmp_path: Path, convention: Any) -> None:
    targets = ["to_q", "to_out.0"] if convention is not CONVENTIONS["flat convolutions"] else ["proj_in", "to_q"]
    final = write_adapter(tmp_path / "final.safetensors", base, alpha=None, target_modules=targets)
    renamed = convention(load_file(exported(final, tmp_path / "zwx", "diffusers")))
    save_file(renamed, tmp_path / "renamed.safetensors")
    back = imported(tmp_path / "renamed.safetensors", base, tmp_path / "back" / "final.safetensors")
    assert_equal_weights(back, final, 2e-3 if convention is CONVENTIONS["half precision"] else 0)


def test_layers_of_several_ranks_and_alphas_are_merged_exactly(base: Path, tmp_path: Path) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base, rank=4)
    tensors = load_file(exported(final, tmp_path / "zwx", "kohya"))
    layers = sorted({name.partition(".")[0] for name in tensors})
    for number, layer in enumerate(layers):
        rank = 1 + number % 4
        tensors[f"{layer}.lora_down.weight"] = tensors[f"{layer}.lora_down.weight"][:rank].clone()
        tensors[f"{layer}.lora_up.weight"] = tensors[f"{layer}.lora_up.weight"][:, :rank].clone()
        tensors[f"{layer}.alpha"] = torch.tensor(float(number % 3))  # 0 is none
        if number % 5 == 4:
            del tensors[f"{layer}.alpha"]
    save_file(tensors, tmp_path / "mixed.safetensors")
    model = load_model(imported(tmp_path / "mixed.safetensors", base, tmp_path / "back" / "final.safetensors"))
    before, after = load_model(base).network.state_dict(), model.network.state_dict()
    for layer in layers:
        [name] = [name for name in before if f"lora_{name.replace('.', '_')}" == f"{layer}_weight"]
        a, b = (tensors[f"{layer}.lora_{end}.weight"].double().flatten(1) for end in ("down", "up"))
        alpha = float(tensors.get(f"{layer}.alpha", torch.tensor(0.0))) or len(a)
        expected = before[name].double() + alpha / len(a) * (b @ a).view(before[name].shape)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)


def _broken(change: Callable[[Tensors], object]) -> Callable[[Path, Tensors], None]:
    def write(path: Path, tensors: Tensors) -> None:
        change(tensors)
        save_file(tensors, path)

    return write


UP = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
DOWN = UP.replace("_up", "_down")
HOSTILE: dict[str, tuple[Callable[[Path, Tensors], object], str]] = {
    "a pickle": (lambda path, tensors: torch.save(tensors, path), "pickle"),
    "an old pickle": (lambda path, tensors: path.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "nothing": (lambda path, tensors: path.write_bytes(b""), "damaged"),
    "cut short": (
        lambda path, tensors: (save_file(tensors, path), path.write_bytes(path.read_bytes()[:-9])),
        "damaged",
    ),
    "a header without end": (
        lambda path, tensors: path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" * 99),
        "names too many tensors",
    ),
    "infinite": (_broken(lambda tensors: tensors[UP].fill_(torch.inf)), "not finite"),
    "not a number": (_broken(lambda tensors: tensors[DOWN].fill_(torch.nan)), "not finite"),
    "alpha not a number": (
        _broken(lambda tensors: tensors.update({UP.partition(".")[0] + ".alpha": torch.tensor(torch.nan)})),
        "not finite",
    ),
    "another alpha": (
        _broken(lambda tensors: tensors.update({UP.partition(".")[0] + ".alpha": torch.ones(2)})),
        "one number",
    ),
    "one of two": (_broken(lambda tensors: tensors.pop(UP)), "one of two"),
    "another shape": (_broken(lambda tensors: tensors.update({UP: torch.ones(3, 2)})), r"\(3, 2\)"),
    "rank 2000": (
        _broken(lambda tensors: tensors.update({UP: torch.ones(8, 2000), DOWN: torch.ones(2000, 8)})),
        "rank 2000",
    ),
    "integers": (_broken(lambda tensors: tensors.update({UP: torch.ones(8, 2, dtype=torch.int8)})), "quantized"),
    "unknown layers": (
        _broken(lambda tensors: tensors.update({f"lora_unet_no_{i}.lora_up.weight": torch.ones(2) for i in range(9)})),
        r"lora_unet_no_0\.lora_up\.weight.* and 6 more, which match no layer",
    ),
    "the same twice": (
        _broken(lambda tensors: tensors.update({UP.replace("lora_unet", "unet"): torch.ones(8, 2)})),
        "twice",
    ),
    "DoRA": (_broken(lambda tensors: tensors.update({UP.partition(".")[0] + ".dora_scale": torch.ones(8)})), "DoRA"),
    "DoRA of one layer": (
        _broken(lambda tensors: tensors.update({UP.partition(".")[0] + ".lora_magnitude_vector": torch.ones(8)})),
        "DoRA in some",
    ),
    "magnitudes of another shape": (
        _broken(lambda tensors: tensors.update({UP.partition(".")[0] + ".lora_magnitude_vector": torch.ones(7)})),
        r"\(7,\)",
    ),
    "LoHa": (_broken(lambda tensors: tensors.update({"lora_unet_a.hada_w1_a": torch.ones(8)})), "LoHa"),
    "metadata": (
        lambda path, tensors: save_file(tensors, path, {"lora_adapter_metadata": json.dumps([1])}),
        "lora_adapter_metadata",
    ),
}


@pytest.mark.parametrize(("write", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_named_and_nothing_is_written(
    base: Path, tmp_path: Path, write: Callable[[Path, Tensors], object], words: str
) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base)
    tensors = load_file(exported(final, tmp_path / "zwx", "kohya"))
    write(tmp_path / "hostile.safetensors", tensors)
    output = tmp_path / "back"
    with pytest.raises(UserError, match=words) as raised:
        imported(tmp_path / "hostile.safetensors", base, output / "final.safetensors")
    assert "\n" not in str(raised.value)
    assert not output.exists() or not any(output.iterdir())


def test_what_an_import_lacks_is_said(base: Path, tmp_path: Path) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base)
    file = exported(final, tmp_path / "zwx", "kohya")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    shutil.copy(base, tmp_path / "sd.ckpt")
    cases: list[tuple[Path, str | None, ImportParts, str]] = [
        (file, None, ImportParts(), "--base"),
        (bare, None, ImportParts(base=base), "--licence"),
        (base, None, ImportParts(base=base), "leave it out"),
        (file, None, ImportParts(base=base, pipeline_config=tmp_path), "--config is of"),
        (tmp_path / "sd.ckpt", None, ImportParts(), "pickle"),
        (tmp_path / "missing.safetensors", None, ImportParts(), "No such file"),
    ]
    for source, licence, parts, words in cases:
        with pytest.raises(UserError, match=words):
            import_file(str(source), tmp_path / "out" / "final.safetensors", licence, tmp_path, parts=parts)


def test_peft_settings_of_other_adapters_are_errors(base: Path, tmp_path: Path) -> None:
    final = write_adapter(tmp_path / "final.safetensors", base, alpha=None)
    tensors = load_file(exported(final, tmp_path / "zwx", "diffusers"))
    for settings, words in (({"unet.use_dora": True}, "DoRA"), ({"unet.lora_alpha": "x"}, "cannot be read")):
        save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(UserError, match=words):
            imported(tmp_path / "peft.safetensors", base, tmp_path / "back" / "final.safetensors")
    settings = _pack_dict_with_prefix({"use_rslora": True, "lora_alpha": 3.0}, "unet")
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    lora = read_model_header(imported(tmp_path / "peft.safetensors", base, tmp_path / "b" / "f.safetensors")).adapter
    assert lora is not None
    assert lora.scale_of("") == pytest.approx(3 / 2**0.5)
