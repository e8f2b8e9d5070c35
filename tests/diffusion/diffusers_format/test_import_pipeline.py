"""Pipelines of diffusers come in as one file, go out as they were, and cannot do harm."""

import json
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion.checkpoints import (
    link_base,
    load_model,
    model_digest,
    read_model_header,
    save_tensors,
    weights_digest,
)
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.model_files import read_header
from diffusion.families.adapters import LoRAConfig
from diffusion.families.config import DiffusersConfig
from diffusion.families.header import Base, Origin
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusion.diffusers_format.export import export_to_diffusers  # noqa: E402
from diffusion.diffusers_format.import_pipeline import import_pipeline  # noqa: E402
from tests.builders import pipelines  # noqa: E402
from tests.builders.flow_pipelines import FLOW_MAKERS  # noqa: E402

ORIGIN = Origin(source="hf://someone/tiny@main", revision="0" * 40)
SCHEDULER = sampling_config(sampler="scheduler", steps=3)
UNET = "unet/diffusion_pytorch_model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    return {each.relative_to(folder).as_posix(): sha256_file(each) for each in folder.rglob("*") if each.is_file()}


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


MAKERS = {**pipelines.MAKERS, **FLOW_MAKERS}


@pytest.fixture
def stable(tmp_path: Path) -> Path:
    return pipelines.stable_diffusion(tmp_path / "stable")


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    return pipelines.ddpm(tmp_path / "ddpm")


@pytest.mark.parametrize("kind", MAKERS)
def test_an_export_is_what_came_in_to_the_byte(tmp_path: Path, kind: str) -> None:
    folder = MAKERS[kind](tmp_path / "pipeline")
    digest = import_pipeline(folder, path := tmp_path / "model.safetensors", ORIGIN)
    assert digest == sha256_file(path)
    header = read_model_header(path)
    assert header.origin is not None
    assert header.origin.files == digests(folder)
    assert (header.origin.licence, header.origin.revision) == ("openrail", "0" * 40)
    export = export_to_diffusers(path, tmp_path / "out", SCHEDULER)
    assert export.files == digests(tmp_path / "out") == digests(folder)
    assert type(diffusers.DiffusionPipeline.from_pretrained(export.folder)).__name__ == export.pipeline
    # Again, into the same folder.
    assert export_to_diffusers(path, tmp_path / "out", SCHEDULER).files == export.files


def test_weights_keep_their_type_and_are_computed_with_in_float32(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "half", dtype=torch.float16)
    import_pipeline(folder, path := tmp_path / "model.safetensors", ORIGIN)
    with safe_open(path, framework="pt") as file:
        weight = file.get_tensor("ema.unet.conv_in.weight")
    assert weight.dtype == torch.float16
    assert torch.equal(weight, load_file(folder / UNET)["conv_in.weight"])
    loaded = load_model(path).network.state_dict()["unet.conv_in.weight"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, weight.float())


def test_digests_are_of_weights_of_any_type_and_of_tokenizers(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "half", dtype=torch.bfloat16)
    digests = []
    for file, text in {
        "LICENSE": "Ours.\n",
        "README.md": "# Another card\n",
        "tokenizer/notes.txt": "Other words\n",
    }.items():
        (folder / file).write_text(text)
        import_pipeline(folder, path := tmp_path / "model.safetensors", ORIGIN.model_copy(update={"licence": "mit"}))
        digests.append((model_digest(path), weights_digest(path)))
    models, weights = zip(*digests, strict=True)
    assert len(set(models)) == 3
    # A card changes nothing that is trained.
    assert weights[0] == weights[1] != weights[2]


def test_a_whole_pipeline_of_a_variant_is_imported_and_a_plain_one_goes_before_it(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "half", variant="fp16", dtype=torch.float16)
    import_pipeline(folder, path := tmp_path / "model.safetensors", ORIGIN)
    assert export_to_diffusers(path, tmp_path / "out", SCHEDULER).files == digests(folder)
    tensors = load_file(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    save_file({name: value.float() for name, value in tensors.items()}, folder / UNET)
    import_pipeline(folder, path, ORIGIN)
    out = export_to_diffusers(path, tmp_path / "again", SCHEDULER).files
    assert out == {name: value for name, value in digests(folder).items() if name != f"{UNET[:-11]}fp16.safetensors"}
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(UserError, match="variants"):
        import_pipeline(folder, path, ORIGIN)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_weights_in_several_files_are_imported_by_their_index(tmp_path: Path, variant: str) -> None:
    folder = pipelines.ddpm(tmp_path / "whole")
    import_pipeline(folder, tmp_path / "one.safetensors", ORIGIN)
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model{variant}-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / "unet" / shard)
    (folder / UNET).unlink()
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    index = folder / f"{UNET}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    import_pipeline(folder, path := tmp_path / "model.safetensors", ORIGIN)
    ours, theirs = (load_model(each).network.state_dict() for each in (path, tmp_path / "one.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert export_to_diffusers(path, tmp_path / "out", SCHEDULER).files == digests(folder)
    for shard in ("../../elsewhere.safetensors", "config.json", "missing.safetensors"):
        change(index, weight_map={"conv_in.weight": shard})
        with pytest.raises(UserError, match=r"index.*\.json names"):
            import_pipeline(folder, path, ORIGIN)


def test_names_of_older_versions_are_those_of_this_one(tmp_path: Path, stable: Path) -> None:
    import_pipeline(stable, tmp_path / "new.safetensors", ORIGIN)
    text = load_file(stable / "text_encoder/model.safetensors")
    older = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    older["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(older, stable / "text_encoder/model.safetensors")
    vae = load_file(stable / "vae/diffusion_pytorch_model.safetensors")
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        vae = {name.replace(f"attentions.0.{new}", f"attentions.0.{old}"): value for name, value in vae.items()}
    assert any("proj_attn" in name for name in vae)
    save_file(vae, stable / "vae/diffusion_pytorch_model.safetensors")
    import_pipeline(stable, path := tmp_path / "old.safetensors", ORIGIN)
    ours, theirs = (load_model(each).network.state_dict() for each in (path, tmp_path / "new.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert export_to_diffusers(path, tmp_path / "out", SCHEDULER).files == digests(stable)


def test_a_pipeline_that_was_adapted_is_exported_with_other_weights_in_that_component_alone(tmp_path: Path) -> None:
    folder = pipelines.stable_diffusion(tmp_path / "half", dtype=torch.float16)
    import_pipeline(folder, base := tmp_path / "base.safetensors", ORIGIN)
    layer = next(name for name in load_file(folder / UNET) if name.endswith("to_q.weight")).removesuffix(".weight")
    before = load_file(folder / UNET)[f"{layer}.weight"]
    a, b = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    about = read_model_header(base).model_copy(
        update={"base": Base(sha256=link_base(base, tmp_path)), "adapter": LoRAConfig(rank=2, alpha=1), "origin": None}
    )
    factors = {f"ema.unet.{layer}.lora_A.weight": a, f"ema.unet.{layer}.lora_B.weight": b}
    save_tensors(path := tmp_path / "adapter.safetensors", factors, {"model_header": about.model_dump(mode="json")})
    export_to_diffusers(path, out := tmp_path / "out", SCHEDULER)
    assert {name for name, digest in digests(out).items() if digests(folder)[name] != digest} == {UNET}
    ours, theirs = load_file(out / UNET), load_file(folder / UNET)
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {f"{layer}.weight"}
    assert ours[f"{layer}.weight"].dtype == torch.float16
    assert torch.allclose(ours[f"{layer}.weight"].float(), before.float() + b @ a / 2, atol=1e-2)


def test_a_safety_checker_is_carried_and_not_run(tmp_path: Path, stable: Path) -> None:
    checker = stable / "safety_checker"
    checker.mkdir()
    save_file({"concept_embeds": torch.ones(17, 8)}, checker / "model.safetensors")
    (checker / "config.json").write_text(json.dumps({"architectures": ["StableDiffusionSafetyChecker"]}))
    (stable / "feature_extractor").mkdir()
    (stable / "feature_extractor/preprocessor_config.json").write_text("{}")
    checker_entry = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    change(stable / "model_index.json", **checker_entry)
    import_pipeline(stable, path := tmp_path / "model.safetensors", ORIGIN)
    assert not any("concept" in name for name in load_model(path).network.state_dict())
    assert export_to_diffusers(path, tmp_path / "out", SCHEDULER).files == digests(stable)


def test_the_licence_is_of_the_model_card_or_of_who_imports(tmp_path: Path, ddpm: Path) -> None:
    card, path = ddpm / "README.md", tmp_path / "model.safetensors"
    for text in (
        "# No front matter\n",
        "---\ntags: []\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: 3\n---\n",
        "---\nlicense: other\n---\n",
        "---\nlicense: unknown\n---\n",
        None,
    ):
        card.unlink(missing_ok=True)
        if text is not None:
            card.write_text(text)
        with pytest.raises(UserError, match="licence"):
            import_pipeline(ddpm, path, ORIGIN)
        assert not path.exists()
    import_pipeline(ddpm, path, ORIGIN.model_copy(update={"licence": "mit"}))
    assert read_model_header(path).origin.licence == "mit"  # type: ignore[union-attr]
    for text, licence in {
        "---\nlicense: other\nlicense_name: our-own\n---\n": "our-own",
        "---\r\nlicense: [mit, apache-2.0]\r\n---\r\n": "mit, apache-2.0",
    }.items():
        card.write_bytes(text.encode())
        import_pipeline(ddpm, path, ORIGIN)
        assert read_model_header(path).origin.licence == licence  # type: ignore[union-attr]


def test_an_export_of_darkroom_is_not_imported_whatever_its_licence(tmp_path: Path, ddpm: Path) -> None:
    network = ["diffusion.diffusers_format.network", "DarkroomUNet"]
    for pipeline in ("DarkroomPipeline", "DDPMPipeline"):
        change(ddpm / "model_index.json", _class_name=pipeline, unet=network)
        with pytest.raises(UserError, match=r"\.safetensors"):
            import_pipeline(ddpm, tmp_path / "model.safetensors", ORIGIN.model_copy(update={"licence": None}))


def a_pickle(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


def a_pickle_in_the_place_of_safetensors(folder: Path) -> None:
    (folder / UNET).write_bytes(pickle.dumps({"conv_in.weight": 1}, protocol=0) * 10)


def code(folder: Path) -> None:
    (folder / "unet/custom.py").write_text("raise SystemExit")


def a_pipeline_of_code(folder: Path) -> None:
    change(folder / "model_index.json", _class_name=["pipeline", "Custom"])


def a_component_of_code(folder: Path) -> None:
    change(folder / "model_index.json", unet=["custom", "UNet2DModel"])


def a_class_off_the_list(folder: Path) -> None:
    change(folder / "model_index.json", unet=["diffusers", "ControlNetModel"])


def a_component_too_many(folder: Path) -> None:
    change(folder / "model_index.json", hook=["builtins", "exec"])


def remote_code(folder: Path) -> None:
    change(folder / "unet/config.json", auto_map={"AutoModel": "custom.Model"})


def trusted_code(folder: Path) -> None:
    change(folder / "scheduler/scheduler_config.json", trust_remote_code=True)


def a_link_out(folder: Path) -> None:
    (folder / "unet/passwd.json").symlink_to("/etc/passwd")


def many_channels(folder: Path) -> None:
    change(folder / "unet/config.json", block_out_channels=[2**40, 2**40])


def many_layers(folder: Path) -> None:
    change(folder / "unet/config.json", layers_per_block=10**6)


def many_blocks(folder: Path) -> None:
    change(folder / "unet/config.json", block_out_channels=[8] * 10**5)


def a_large_image(folder: Path) -> None:
    change(folder / "unet/config.json", sample_size=10**5)


def a_large_json(folder: Path) -> None:
    (folder / "unet/config.json").write_text(" " * 2**21 + "{}")


def deep_json(folder: Path) -> None:
    (folder / "unet/config.json").write_text("[" * 10**5)


def another_network(folder: Path) -> None:
    change(folder / "unet/config.json", block_out_channels=[8, 32])


def a_configuration_of_nothing(folder: Path) -> None:
    change(folder / "unet/config.json", down_block_types=["Nothing", "Nothing"])


def classes_of_no_number(folder: Path) -> None:
    change(folder / "unet/config.json", num_class_embeds="ten")


def a_class_beyond_all_numbers(folder: Path) -> None:
    change(folder / "model_index.json", id2label={"9" * 5000: "cat"})
    (folder / UNET).unlink()


def quantized(folder: Path) -> None:
    change(folder / "unet/config.json", quantization_config={"quant_method": "bitsandbytes"})


def weights_of_nothing(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "whole.safetensors")


def missing_weights(folder: Path) -> None:
    (folder / UNET).unlink()


def a_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / UNET)


def eight_bits(folder: Path) -> None:
    save_file({name: value.to(torch.int8) for name, value in load_file(folder / UNET).items()}, folder / UNET)


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


PLANTED = (
    a_pickle,
    a_pickle_in_the_place_of_safetensors,
    code,
    a_pipeline_of_code,
    a_component_of_code,
    a_class_off_the_list,
    a_component_too_many,
    remote_code,
    trusted_code,
    a_link_out,
    many_channels,
    many_layers,
    many_blocks,
    classes_of_no_number,
    a_class_beyond_all_numbers,
    a_large_image,
    a_large_json,
    deep_json,
    another_network,
    a_configuration_of_nothing,
    quantized,
    weights_of_nothing,
    missing_weights,
    a_missing_tensor,
    eight_bits,
    no_index,
)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_planted_in_a_folder_is_rejected_in_one_line(
    tmp_path: Path, ddpm: Path, plant: Callable[[Path], None]
) -> None:
    plant(ddpm)
    with pytest.raises(UserError) as error:
        import_pipeline(ddpm, path := tmp_path / "model.safetensors", ORIGIN)
    assert "\n" not in str(error.value)
    assert not path.exists()


def test_an_import_says_which_library_is_missing(tmp_path: Path, ddpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("diffusion.diffusers_format.import_pipeline.version", version)
    with pytest.raises(UserError, match="diffusers, which is not installed"):
        import_pipeline(ddpm, tmp_path / "model.safetensors", ORIGIN)


def test_remote_code_of_a_tokenizer_is_rejected(tmp_path: Path, stable: Path) -> None:
    change(stable / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Tokenizer", None]})
    with pytest.raises(UserError, match="remote code"):
        import_pipeline(stable, tmp_path / "model.safetensors", ORIGIN)


def test_a_changed_model_file_is_rejected(tmp_path: Path, stable: Path) -> None:
    import_pipeline(stable, path := tmp_path / "model.safetensors", ORIGIN)
    header, tensors = read_header(path), load_file(path)
    name = "files.tokenizer/tokenizer_config.json"
    tensor = tensors[name].clone()
    tensor[5] += 1
    save_tensors(tmp_path / "one.safetensors", tensors | {name: tensor}, header)
    save_tensors(tmp_path / "two.safetensors", tensors | {"files.../outside": tensor}, header)
    del tensors["ema.vae.quant_conv.bias"]
    save_tensors(tmp_path / "three.safetensors", tensors, header)
    about = header["model_header"]
    about["origin"]["files"]["../outside"] = "0" * 64
    save_tensors(tmp_path / "four.safetensors", tensors, header)
    # Images of another size than those of the network.
    header = read_header(path)
    header["model_header"]["size"] *= 2
    save_tensors(tmp_path / "five.safetensors", load_file(path), header)
    for each in ("one", "two", "three", "four", "five"):
        with pytest.raises(UserError):
            load_model(tmp_path / f"{each}.safetensors")


def test_nothing_is_loaded_from_a_cache_or_from_a_network(
    tmp_path: Path, stable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    import_pipeline(stable, path := tmp_path / "model.safetensors", ORIGIN)
    shutil.rmtree(stable)
    model = load_model(path)
    assert model.encode_prompt("a red circle")["states"].shape == (16, 16)


def test_the_configuration_of_a_pipeline_is_complete() -> None:
    assert DiffusersConfig().pipeline is None  # of training.init_from
    with pytest.raises(ValueError, match="needs"):
        DiffusersConfig(pipeline="DDPMPipeline")
    with pytest.raises(ValueError, match="not supported"):
        DiffusersConfig(pipeline="Unknown")


def test_a_dit_of_an_older_diffusers_is_the_same_network(tmp_path: Path) -> None:
    newer = pipelines.dit(tmp_path / "newer")
    older = tmp_path / "older"
    shutil.copytree(newer, older)
    change(older / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    # With fields that only the older class had.
    change(older / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    for folder in (newer, older):
        import_pipeline(folder, folder.with_suffix(".safetensors"), ORIGIN)
    images = [
        sample(load_model(tmp_path / f"{name}.safetensors"), range(2), 0, SCHEDULER) for name in ("newer", "older")
    ]
    assert torch.equal(*images)
    export = export_to_diffusers(tmp_path / "older.safetensors", tmp_path / "exported", SCHEDULER).folder
    assert digests(export) == digests(older)
