"""What people read of ``darkroom trace`` and ``reproduce``: short labelled lines, and no line for what is not there."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import pytest

from diffusion.common.files import sha256_file
from diffusion.common.fingerprint import Fingerprint
from diffusion.generation.config import Conditions
from diffusion.process.samplers import sampling_config
from flows.provenance import reproduce, trace
from flows.provenance.reproduce import ImageComparison, Reproduction
from flows.provenance.trace import Takedown, Trace, TracedData, TracedImage, TracedModel, TracedRun, TracedShard
from flows.sampling.batch_format import SamplingBatch
from tests.builders.command_line import CommandLine
from tests.builders.small_models import write_model

FINGERPRINT = Fingerprint(batch=4, precision="fp32", device="cpu", torch="2")
THEN = datetime(2026, 5, 4, 3, 2, tzinfo=UTC)
BATCH = SamplingBatch(
    model="faces",
    version=3,
    run_id="1" * 32,
    content_digest="c" * 64,
    weights_sha256="d" * 64,
    seed=7,
    count=1000,
    sampling=sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=4),
    fingerprint=FINGERPRINT,
    conditions=Conditions(labels=("cat",)),
)
TRACE = Trace(
    image=TracedImage(
        where="a.png", sha256="a" * 64, pixels_sha256=None, index=5, seed=7, label="cat", prompt=None, as_generated=True
    ),
    place="s3://b/p/",
    batch=BATCH,
    finished=True,
    request=None,
    model=TracedModel(
        uri="models:/faces/3",
        aliases=["champion"],
        registered=THEN,
        code_sha256=None,
        tags={"darkroom.images": "480", "kid": "0.25"},
    ),
    run=TracedRun(
        run_id="1" * 32, name="train-1", status="FINISHED", started=THEN, git_commit="c0ffee", git_dirty=False
    ),
    data=TracedData(
        dataset="faces",
        version="e" * 64,
        content_digest="c" * 64,
        dvc_digest=None,
        recorded=None,
        images=2000,
        sources=["hf://datasets/me/faces@0123"],
        shards=[TracedShard(name="shards/0.tar", sha256="f" * 64, bytes=4096, where=None)],
    ),
    takedowns=[Takedown(name="t1", reason="consent withdrawn", images=2)],
    origins=[],
    broken=[],
)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, command_line: CommandLine) -> Callable[..., list[str]]:
    monkeypatch.setattr("flows.cli.command.connect", lambda *_: nullcontext())
    return lambda *words: command_line(*words, "s3://bucket/p/a.png").splitlines()


def test_a_trace_has_a_few_lines_for_each_link(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[..., list[str]]
) -> None:
    monkeypatch.setattr(trace, "trace", lambda _: TRACE)
    output = lines("trace", "-v")
    for line in (
        "image     a.png: number 5 of seed 7, 'cat', as generated",
        f"          sha256 {'a' * 64}",
        "batch     s3://b/p/: 1,000 images of seed 7, finished",
        "          conditions labels ['cat']",
        "model     models:/faces/3 @champion, registered 2026-05-04 03:02 UTC",
        "          code: no digest of it, or not as registered",
        "          darkroom.images 480",
        "          kid 0.25",
        f"run       {'1' * 32} (train-1), started 2026-05-04 03:02 UTC, git commit c0ffee",
        "          finished, git commit c0ffee, everything committed",
        "data set  faces, version eeeeeeeeeeee: 2,000 images in 1 shard, 1 of them lost",
        f"          version {'e' * 64}, not in the catalog",
        "          DVC has no record of it",
        f"shard     {'f' * 64}  4,096 bytes  shards/0.tar  lost",
        "takedown  t1 (2 images)",
        "          t1: consent withdrawn",
    ):
        assert line in output
    assert not any(word in line for line in output for word in ("None", "null", "{"))
    monkeypatch.setattr(trace, "trace", lambda _: TRACE.model_copy(update=dict.fromkeys(("image", "batch", "run"))))
    assert [line.split()[0] for line in lines("trace", "-v") if line[0] != " "] == [
        *("model", "data", "source", "shard", "takedown")
    ]


def test_a_trace_has_six_lines_without_verbose(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[..., list[str]]
) -> None:
    monkeypatch.setattr(trace, "trace", lambda _: TRACE)
    output = lines("trace")
    assert [line.split()[0] for line in output] == ["image", "batch", "model", "run", "data", "source", "takedown"]
    # The chain of names, and what is wrong with it.
    for name in (
        "a.png",
        "s3://b/p/",
        "models:/faces/3 @champion",
        "1" * 32,
        "faces, version eeee",
        "1 of them lost",
        "t1",
    ):
        assert any(name in line for line in output), name


def test_reproduction_reports_equal_images_and_the_largest_errors(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[..., list[str]]
) -> None:
    other = ImageComparison(
        key="00000005", exact=False, altered=False, largest_error=2, mean_error=0.01, differing_pixels=9
    )
    reproduction = Reproduction(
        where="s3://b/p/",
        model="models:/faces/3",
        code="shipped",
        images=4,
        exact=3,
        fingerprint=FINGERPRINT,
        differences="torch: 2 → 3",
        moved=[],
        largest_error=2,
        mean_error=0.01,
        differing_pixels=9,
        other=[other],
        altered=[],
        folder=None,
    )
    monkeypatch.setattr(reproduce, "reproduce", lambda *_: reproduction)
    assert lines("reproduce") == [
        "3 of 4 identical bit for bit, regenerated with the code that models:/faces/3 ships",
        "the fingerprint differs: torch: 2 → 3 (then → now)",
        "largest pixel error 2 of 255, 9 pixels differ, mean error of the worst image 0.01 of 255 (within the "
        "numerical tolerance)",
        "  00000005: off by 2 of 255 at most",
    ]


@pytest.mark.usefixtures("no_servers")
@pytest.mark.parametrize("name", ["grid.png", "00000001.png"])
def test_trace_reads_the_record_of_a_model_files_images(name: str, command_line: CommandLine) -> None:
    weights = write_model(Path("m.safetensors"), seed=0, images=1)
    command_line(
        *[
            "sample",
            "--model",
            "m.safetensors",
            "--count",
            "2",
            "--seed",
            "7",
            "--out",
            "made",
            "--set",
            "sampling.steps=2",
        ]
    )
    error = command_line.mistake("trace", f"made/{name}")
    assert sha256_file(weights) in error
    assert "seed '7'" in error
