"""Encoders of images and texts: embeddings as transformers computes them, and nothing but data read from the folder."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion.common.errors import UserError
from diffusion.evaluation.features.text_image_encoder import open_text_image_encoder
from tests.builders.text_image_encoders import (
    END,
    MAX_TOKENS,
    START,
    VOCABULARY,
    rewrite,
    write_clip,
    write_onnx,
    write_processor,
)

TEXTS = ["red square", "a", "BLUE", "a caption of more than twelve letters", ""]


def images(channels: int = 3, size: int = 24, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("channels", "size", "resized"), [(3, 24, 16), (1, 8, 16), (3, 16, 16), (3, 64, 20)])
def test_clip_embeds_images_as_transformers_does(channels: int, size: int, resized: int, tmp_path: Path) -> None:
    model, pixels = write_clip(tmp_path, size=resized), images(channels, size)
    prepared = write_processor(tmp_path, resized).image_processor(
        list(pixels.expand(-1, 3, -1, -1)), return_tensors="pt"
    )
    expected = normalize(model.get_image_features(**prepared).pooler_output)
    torch.testing.assert_close(open_text_image_encoder(tmp_path)(pixels), expected, atol=5e-3, rtol=0)


def test_clip_embeds_texts_as_transformers_does_each_by_itself(tmp_path: Path) -> None:
    model, processor = write_clip(tmp_path), write_processor(tmp_path)
    tokens = processor.tokenizer(TEXTS, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    expected = normalize(model.get_text_features(**tokens).pooler_output)
    encoder = open_text_image_encoder(tmp_path)
    torch.testing.assert_close(encoder.embed(TEXTS), expected, atol=1e-5, rtol=0)
    assert torch.equal(encoder.embed(TEXTS)[1:2], encoder.embed(["a"]))


def tokens_of(text: str) -> list[int]:
    """Letters, the last of each word marked, between the two ends, and cut to their number."""
    letters = [letter + "</w>" * (n == len(word) - 1) for word in text.lower().split() for n, letter in enumerate(word)]
    return [START, *(VOCABULARY[letter] for letter in letters), END]


@pytest.mark.parametrize(("length", "mask"), [("L", False), ("L", True), (MAX_TOKENS, True)])
@pytest.mark.parametrize("inner", ["", "onnx"])
def test_onnx_networks_embed_what_is_prepared_for_them(
    length: int | str, mask: bool, inner: str, tmp_path: Path
) -> None:
    colours, words = write_onnx(tmp_path, length, mask)
    if inner:
        (tmp_path / inner).mkdir()
        for path in tmp_path.glob("*.onnx"):
            path.rename(tmp_path / inner / path.name)
    encoder = open_text_image_encoder(tmp_path)
    flat = torch.tensor([[255, 0, 0], [10, 200, 30]]).to(torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)
    image_processor = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    scaled = (flat[:, :, 0, 0].numpy() / 255 - image_processor["image_mean"]) / image_processor["image_std"]
    expected = normalize(torch.from_numpy(scaled @ colours).float())
    torch.testing.assert_close(encoder(flat), expected, atol=1e-5, rtol=0)
    short = ["red", "a square"]
    sums = np.stack([words[tokens_of(text)].sum(0) for text in short])
    torch.testing.assert_close(encoder.embed(short), normalize(torch.from_numpy(sums)), atol=1e-5, rtol=0)


def test_an_encoder_is_identified_by_content_not_by_place(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_clip(tmp_path / name, seed)
    one, same, other = (open_text_image_encoder(tmp_path / name) for name in ("one", "same", "other"))
    assert (one.digest, one.name) == (same.digest, same.name)
    assert one.digest != other.digest
    rewrite(tmp_path / "same" / "processor_config.json", image_processor={**PROCESSOR, "image_mean": [0.5, 0.5, 0.5]})
    assert open_text_image_encoder(tmp_path / "same").digest != one.digest


PROCESSOR = {
    "size": {"shortest_edge": 16},
    "crop_size": 16,
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def test_the_processor_of_former_transformers_prepares_the_same(tmp_path: Path) -> None:
    write_clip(tmp_path)
    before = open_text_image_encoder(tmp_path)(images())
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"size": 16}))
    assert torch.equal(open_text_image_encoder(tmp_path)(images()), before)


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


def test_pickles_and_code_in_the_folder_are_not_run(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    (tmp_path / "clip" / "code.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    remote = {"auto_map": {"AutoModel": "code.Model"}, "quantization_config": {"quant_method": "fp8"}}
    rewrite(tmp_path / "clip" / "config.json", attn_implementation="someone/kernels", **remote)
    (tmp_path / "clip" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    assert open_text_image_encoder(tmp_path / "clip")(images()).shape == (5, 8)
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickle"):
        open_text_image_encoder(tmp_path / "clip")
    assert not (tmp_path / "ran").exists()


def use(folder: Path) -> None:
    encoder = open_text_image_encoder(folder)
    encoder(images())
    encoder.embed(["red"])


def one_line(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        use(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_an_encoder_is_an_error(tmp_path: Path) -> None:
    assert "CLIPModel.save_pretrained" in one_line(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "siglip"}'),
        ("tokenizer.json", b"no tokenizer"),
        ("processor_config.json", b'{"image_processor": {"size": 16}}'),
        ("processor_config.json", None),
        ("model.safetensors", b"no weights"),
    ],
)
def test_a_damaged_file_of_clip_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    write_clip(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
        assert "processor_config.json" in one_line(tmp_path)
    else:
        (tmp_path / name).write_bytes(content)
        assert re.search(re.escape(name), one_line(tmp_path))


def test_a_tokenizer_or_weights_of_another_model_are_found_out(tmp_path: Path) -> None:
    write_clip(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    rewrite(tmp_path / "config.json", text_config=text | {"eos_token_id": 7})
    assert "tokenizer.json belongs to another model" in one_line(tmp_path)
    rewrite(tmp_path / "config.json", text_config=text | {"num_hidden_layers": 3})
    assert "lacks text_model" in one_line(tmp_path)


def test_onnx_networks_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    write_onnx(tmp_path)
    (tmp_path / "text_model.onnx").write_bytes((tmp_path / "vision_model.onnx").read_bytes())
    assert "does not take input_ids" in one_line(tmp_path)
    write_onnx(tmp_path)
    write_processor(tmp_path, 32, 32)
    assert "(N, 3, 32, 32)" in one_line(tmp_path)
    (tmp_path / "vision_model.onnx").write_bytes(b"no network")
    assert "vision_model.onnx" in one_line(tmp_path)
