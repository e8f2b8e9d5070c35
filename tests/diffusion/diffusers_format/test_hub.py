"""Pipelines from and to the Hugging Face Hub, by its real client and a stub that also misbehaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils._runtime import is_xet_available

from diffusion.checkpoints import load_model, read_model_header
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import sha256_bytes
from diffusion.common.hub import HubFile, Repository
from diffusion.diffusers_format.export import export_to_diffusers, readme
from diffusion.diffusers_format.hub import download_pipeline, hub_card, push_to_hub
from diffusion.diffusers_format.import_model import import_file
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.header import Origin
from diffusion.process.samplers import sampling_config
from tests.builders import pipelines
from tests.builders.reading_sources import png, write_files
from tests.hub import TOKEN, Hub

CARD = b"---\nlicense: openrail\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny pipeline, as diffusers writes them."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(8)).save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_is_downloaded_without_anything_else(hub: Hub, tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    files = pipeline | {"README.md": CARD}
    others = {
        "pipeline.py": b"raise SystemExit",
        "unet/modeling.py": b"raise SystemExit",
        "unet/diffusion_pytorch_model.bin": b"a pickle",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "v1-5-pruned.safetensors": b"one file",
        "vae_decoder/model.onnx": b"another format",
        ".gitattributes": b"",
    }
    repo = hub.model("me/tiny", files | others)
    origin = download_pipeline("hf://me/tiny", tmp_path / "tiny")
    assert contents(tmp_path / "tiny") == files
    assert origin.files == {path: sha256_bytes(data) for path, data in files.items()}
    assert (origin.source, origin.revision, origin.licence) == ("hf://me/tiny", repo.refs["main"], "openrail")
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path / "tiny").unet.config.sample_size == 8
    # Again, and pinned: nothing is fetched twice.
    hub.requests.clear()
    assert download_pipeline(f"hf://me/tiny@{origin.revision}", tmp_path / "tiny") == origin
    assert not hub.paths("safetensors")


def test_a_revision_is_what_it_was(hub: Hub, tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    repo = hub.model("me/tiny", pipeline)
    first = repo.refs["main"]
    repo.commit(pipeline | {"scheduler/scheduler_config.json": b"{}"})
    assert download_pipeline(f"hf://me/tiny@{first}", tmp_path / "first").revision == first
    assert contents(tmp_path / "first") == pipeline
    with pytest.raises(UserError, match="no revision v2: there is main"):
        download_pipeline("hf://me/tiny@v2", tmp_path / "other")
    # The files of two revisions do not mix.
    (tmp_path / "first" / "evil.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"evil\.bin"):
        download_pipeline(f"hf://me/tiny@{first}", tmp_path / "first")


def test_what_is_no_pipeline_of_safetensors_is_rejected(hub: Hub, tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    without = {path: data for path, data in pipeline.items() if path != weights}
    hub.model("me/pickled", without | {"unet/diffusion_pytorch_model.bin": b"a pickle"})
    variants = {f"unet/diffusion_pytorch_model.{name}.safetensors": b"other" for name in ("fp16", "non_ema")}
    hub.model("me/halved", without | variants)
    hub.model("me/single", {"model.ckpt": b"a pickle"})
    hub.model("me/broken", pipeline | {"model_index.json": b"["})
    hub.model("me/gated", pipeline, gated=True)
    hub.model("me/private", pipeline, private=True)
    for name, words in {
        "pickled": "pickle",
        "halved": "fp16, non_ema",
        "single": r"no model_index\.json, only model\.ckpt",
        "broken": r"model_index\.json",
        "gated": "gated.*HF_TOKEN",
        "private": "HF_TOKEN",
        "missing": "OWNER/NAME",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            download_pipeline(f"hf://me/{name}", tmp_path / name)
        assert "\n" not in str(error.value)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("lie", [{"other_bytes": True}, {"added_size": 9}, {"added_size": -9}, {"endless": True}])
def test_other_bytes_than_listed_never_reach_the_folder(
    hub: Hub, tmp_path: Path, pipeline: dict[str, bytes], lie: dict[str, object]
) -> None:
    hub.model("me/tiny", pipeline)
    vars(hub).update(lie)
    with pytest.raises(DarkroomError, match="me/tiny@"):
        download_pipeline("hf://me/tiny", tmp_path / "tiny")
    assert not [path for path in contents(tmp_path).values() if path in pipeline.values()]


def test_what_is_no_hub_and_a_commit_that_is_gone_are_errors_of_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.model("me/tiny", {})
    missing_commit = Repository("model", "me/tiny", "b" * 40)
    with pytest.raises(DarkroomError, match="b" * 40) as error:
        missing_commit.read(HubFile("config.json", 2, "c" * 40))
    assert "\n" not in str(error.value)
    # A page in the place of JSON.
    hub.statuses = [200]
    with pytest.raises(DarkroomError, match="HF_ENDPOINT"):
        download_pipeline("hf://me/tiny", tmp_path / "tiny")


@pytest.mark.parametrize("address", ["ftp://127.0.0.1", "127.0.0.1"])
def test_an_endpoint_that_cannot_be_is_a_mistake_of_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UserError, match="HF_ENDPOINT") as error:
        download_pipeline("hf://me/tiny", tmp_path / "tiny")
    assert "\n" not in str(error.value)


def test_no_upload_or_pause_of_the_library_escapes_the_client(
    hub: Hub, tmp_path: Path, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own uploads by Xet, and its own waits for as long as an answer says, have no deadline."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("diffusion.common.http_client.MAX_PAUSE", 0.0)
    hub.statuses, hub.retry_after = [503], "999999999"
    assert push_to_hub("hf://me/new", write_files(tmp_path / "export", pipeline), "# Card", {}, "Export").created
    assert hub.stored
    assert is_xet_available() is False


def test_a_repeated_import_goes_on_although_the_branch_moved(
    hub: Hub, tmp_path: Path, pipeline: dict[str, bytes]
) -> None:
    repo = hub.model("me/tiny", pipeline | {"LICENSE": b"Ours."})
    path, downloads = tmp_path / "model.safetensors", tmp_path / "downloads"
    with pytest.raises(UserError, match="licence"):
        import_file("hf://me/tiny", path, None, downloads)
    second = repo.commit(pipeline)
    assert import_file("hf://me/tiny", path, "mit", downloads).origin.revision == second
    hub.requests.clear()
    assert import_file(f"hf://me/tiny@{second}", path, "mit", downloads).origin.source == "hf://me/tiny"
    assert not hub.paths("safetensors")


def test_drops_are_resumed(hub: Hub, tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    hub.model("me/tiny", pipeline)
    hub.drop_after = 100_000
    download_pipeline("hf://me/tiny", tmp_path / "tiny")
    assert contents(tmp_path / "tiny") == pipeline
    assert next(headers["Range"] for *_, headers in hub.requests if "Range" in headers) == "bytes=100000-"


@pytest.mark.slow
def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    weights = os.urandom(30_000_000)
    index = json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}).encode()
    files = {"model_index.json": index, "unet/model.safetensors": weights, "unet/config.json": b"{}"}
    hub.model("me/large", files)
    hub.pause = 0.02
    script = (
        "import sys; from pathlib import Path; from diffusion.diffusers_format.hub import download_pipeline; "
        "download_pipeline('hf://me/large', Path(sys.argv[1]))"
    )
    partial = None
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "large")])
    while partial is None or partial.stat().st_size < 1_000_000:
        assert child.poll() is None
        time.sleep(0.01)
        partial = next((tmp_path / "large").rglob(".model.safetensors.*.partial"), None)
    child.send_signal(signal.SIGKILL)
    child.wait()
    received, hub.pause = partial.stat().st_size, 0.0
    hub.requests.clear()
    download_pipeline("hf://me/large", tmp_path / "large")
    assert contents(tmp_path / "large") == files
    ranges = [headers.get("Range") for _, path, headers in hub.requests if path.endswith("model.safetensors")]
    assert ranges == [f"bytes={received}-"]


def test_a_push_is_one_private_commit_and_the_same_again_is_none(
    hub: Hub, tmp_path: Path, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "export", pipeline | {"README.md": b"local"})
    samples = {"samples/0-abc.png": png(1)}
    with pytest.raises(UserError, match="HF_TOKEN"):
        push_to_hub("hf://me/new", folder, "# Card", samples, "Export")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    origin = push_to_hub("hf://me/new", folder, "# Card", samples, "Export")
    repo = hub.repos["model", "me/new"]
    assert (origin.created, origin.commit, repo.private) == (True, repo.refs["main"], True)
    assert repo.messages == ["initial commit", "Export"]
    expected = pipeline | samples | {"README.md": b"# Card"}
    assert {path: data for path, data in repo.files.items() if path != ".gitattributes"} == expected
    # Another machine generates other bits under the same name.
    again = push_to_hub("hf://me/new", folder, "# Card", {"samples/0-abc.png": png(2)}, "Export")
    assert again == origin.model_copy(update={"created": False})
    assert len(repo.commits) == 2
    # What comes back is what went out.
    download_pipeline("hf://me/new", tmp_path / "back")
    assert contents(tmp_path / "back") == pipeline | {"README.md": b"# Card"}
    # Another export replaces what belonged to this one, and nothing that people added.
    repo.commit(repo.files | {"LICENSE": b"mine"})
    push_to_hub("hf://me/new", folder, "# New card", {"samples/1-def.png": png(2)}, "Export")
    assert {"LICENSE", "samples/1-def.png"} <= repo.files.keys()
    assert "samples/0-abc.png" not in repo.files
    assert push_to_hub("hf://me/open", folder, "# Card", {}, "Export", public=True).created
    assert not hub.repos["model", "me/open"].private


def test_a_push_whose_answers_are_lost_is_made_once(
    hub: Hub, tmp_path: Path, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = write_files(tmp_path / "export", pipeline)
    hub.drop_uploads = hub.drop_commits = 1
    origin = push_to_hub("hf://me/new", folder, "# Card", {}, "Export")
    repo = hub.repos["model", "me/new"]
    assert (origin.commit, repo.messages) == (repo.refs["main"], ["initial commit", "Export"])


def test_a_push_with_a_token_of_someone_else_is_one_line(
    hub: Hub, tmp_path: Path, pipeline: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="HF_TOKEN") as error:
        push_to_hub("hf://me/new", write_files(tmp_path / "export", pipeline), "# Card", {}, "Export")
    assert "hf_another" not in str(error.value)


@pytest.mark.parametrize(
    ("licence", "name", "custom"),
    [
        ("CC-BY-4.0", "cc-by-4.0", None),
        (None, "unknown", None),
        ("For my *friends* only", "other", "for-my-friends-only"),
    ],
)
def test_the_card_is_what_the_hub_reads(licence: str | None, name: str, custom: str | None) -> None:
    metrics = {"kid_a": 0.5, "kid_a_low": 0.4, "kid_a_high": 0.6, "images": 8.0, "real_baseline_kid_a": 0.1}
    metrics |= {"real_baseline_kid_a_low": 0.0, "real_baseline_kid_a_high": 0.2}
    sources = [f"hf://datasets/me/blobs@{'a' * 40}?split=train", f"hf://datasets/me/blobs@{'b' * 40}"]
    origin = Origin(source="hf://me/base", revision="c" * 40)
    text = hub_card(
        "# Faces", "me/faces", "faces", licence, sources, origin, metrics, ["samples/0.png"], conditional=False
    )
    card = ModelCard(text)
    data = card.data.to_dict()
    assert (data["license"], data.get("license_name")) == (name, custom)
    assert (data["library_name"], data["datasets"], data["base_model"]) == ("diffusers", ["me/blobs"], "me/base")
    [result] = card.data.eval_results or []
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("kid_a", 0.5, "me/blobs")
    assert result.metric_args == {"interval": [0.4, 0.6], "confidence": 0.95}
    assert "samples/0.png" in card.text
    assert "| kid_a | 0.5 | 0.4 … 0.6 |" in card.text


def test_a_pipeline_of_the_hub_is_imported_with_its_origin_and_exported_as_it_was(hub: Hub, tmp_path: Path) -> None:
    files = contents(pipelines.stable_diffusion(tmp_path / "made"))
    commit = hub.model("me/tiny", files).refs["main"]
    origin = download_pipeline("hf://me/tiny", tmp_path / "downloaded")
    import_pipeline(tmp_path / "downloaded", tmp_path / "tiny.safetensors", origin)
    header = read_model_header(tmp_path / "tiny.safetensors")
    assert header.origin is not None
    assert (header.origin.source, header.origin.revision, header.origin.licence) == ("hf://me/tiny", commit, "openrail")
    export = export_to_diffusers(tmp_path / "tiny.safetensors", tmp_path / "exported", sampling_config(steps=4))
    assert contents(tmp_path / "exported") == files
    about = readme(load_diffusion(tmp_path / "tiny.safetensors"), sampling_config(steps=4), export, "me/copy")
    assert commit in about
    assert 'StableDiffusionPipeline.from_pretrained("me/copy")' in about


def load_diffusion(path: Path) -> DiffusionModel:
    model = load_model(path)
    assert isinstance(model, DiffusionModel)
    return model
