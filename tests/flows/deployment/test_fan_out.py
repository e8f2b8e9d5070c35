"""Shards as Prefect tasks: a chunk that fails is tried again, and only that one."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from diffusion.data.ingest.chunks import Chunk, prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest
from flows.deployment.tasks import prefect_fan_out, task_runner
from tests.builders.ingested import files_of
from tests.builders.shapes import blob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def _prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=60):
        yield


def test_a_failed_chunk_is_retried_alone_and_leaves_no_trace(images: Path, tmp_path: Path) -> None:
    for number in range(100, 1700):
        blob(number).save(images / "odd" / f"{number}.png")
    config = IngestConfig(source=str(images), size=8)
    undisturbed = tmp_path / "undisturbed" / "set"
    ingest(undisturbed, config)
    tries: Counter[int] = Counter()

    def unlucky(chunk: Chunk) -> str:
        tries[chunk.first] += 1
        if chunk.first == 513 and tries[chunk.first] == 1:
            raise ConnectionResetError("the first time only")
        return prepare_chunk(chunk)

    @flow(task_runner=task_runner(config))
    def make() -> IngestResult:
        run = prefect_fan_out(config)
        return ingest(tmp_path / "set", config, fan_out=lambda _, chunks: run(unlucky, chunks))

    make()
    assert tries == {1: 1, 513: 2, 1025: 1, 1537: 1}
    assert files_of(tmp_path / "set") == files_of(undisturbed)
