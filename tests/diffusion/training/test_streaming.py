"""Training from shards that are elsewhere, and in windows of shards."""

from pathlib import Path

import pytest

from diffusion.common.errors import UserError
from diffusion.data.manifest import read_manifest, write_manifest
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import CONFIG, Away, Stop, StopAt, run


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A data set of 64 images in 8 shards, a quarter of it held out."""
    write_dataset(tmp_path / "data" / "sharded", random_images(64), per_shard=8)
    return tmp_path / "data" / "sharded"


@pytest.mark.parametrize("window", [None, 2])
def test_streamed_shards_give_the_weights_of_local_ones(sharded: Path, tmp_path: Path, window: int | None) -> None:
    config = CONFIG.model_copy(update={"window": window})
    local = run(sharded, tmp_path / "local", config).final.read_bytes()
    shards = read_manifest(sharded).shards
    room = sum(shard.bytes for shard in shards[:4] if window) or sum(shard.bytes for shard in shards)
    store = Away(sharded, tmp_path / "remote")
    streaming = config.model_copy(update={"stream_bytes": room, "cache_bytes": 0})
    with pytest.raises(Stop):
        run(sharded, tmp_path / "streamed", streaming, store=store, track=lambda _: StopAt(112))
    streamed = run(sharded, tmp_path / "streamed", streaming, store=store)
    assert streamed.final.read_bytes() == local
    assert sum(path.stat().st_size for path in (sharded.parent / ".shards").glob("*.tar")) <= room


def test_shuffle_window_changes_the_order_and_the_run(sharded: Path, tmp_path: Path) -> None:
    whole = run(sharded, tmp_path / "run").final.read_bytes()
    windowed = CONFIG.model_copy(update={"window": 2})
    with pytest.raises(UserError, match=r"differs in training\.window"):
        run(sharded, tmp_path / "run", windowed)
    assert run(sharded, tmp_path / "run", windowed, restart="if_different").final.read_bytes() != whole


def test_with_windows_other_shards_are_another_run(tmp_path: Path) -> None:
    folders = {}
    for per_shard in (8, 16):
        folder = tmp_path / str(per_shard) / "sharded"
        manifest = write_dataset(folder, random_images(64), per_shard)
        folders[per_shard] = folder
        write_manifest(folder, manifest.model_copy(update={"content_digest": "0" * 64}))
    whole = run(folders[8], tmp_path / "plain").final.read_bytes()
    assert run(folders[16], tmp_path / "plain").final.read_bytes() == whole
    windowed = CONFIG.model_copy(update={"window": 2})
    run(folders[8], tmp_path / "windowed", windowed)
    with pytest.raises(UserError, match="differs in the data set's shards"):
        run(folders[16], tmp_path / "windowed", windowed)


def test_a_cache_too_small_is_rejected_with_what_would_fit(sharded: Path, tmp_path: Path) -> None:
    sizes = sorted((shard.bytes for shard in read_manifest(sharded).shards), reverse=True)
    store = Away(sharded, tmp_path / "remote")

    def error_of(**loading: int) -> str:
        with pytest.raises(UserError) as error:
            run(sharded, tmp_path / "run", CONFIG.model_copy(update=loading), store=store)
        return str(error.value)

    words = error_of(stream_bytes=sum(sizes) - 1)
    assert f"raise training.stream_bytes to {sum(sizes)}, or set training.window to 3 or less" in words
    words = error_of(stream_bytes=sum(sizes[:4]), window=3)
    assert f"raise training.stream_bytes to {sum(sizes[:6])}, or set training.window to 2 or less" in words
    assert "training.window to" not in error_of(stream_bytes=sum(sizes[:2]) - 1, window=1)


def test_streaming_without_a_remote_is_rejected(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.stream_bytes is set, and there is no remote"):
        run(sharded, tmp_path / "run", CONFIG.model_copy(update={"stream_bytes": 2**20}))
