"""A stage is one Prefect task: one that fails is tried again, and continues with the chunks that are missing."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.chunks import Chunk, prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest
from diffusion.data.manifest import work_folder
from flows.deployment.tasks import retryable_task
from tests.builders.ingested import files_of
from tests.builders.shapes import blob

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def _prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=60):
        yield


def test_a_failed_stage_is_retried_without_its_finished_chunks(images: Path, tmp_path: Path) -> None:
    for number in range(100, 1700):
        blob(number).save(images / "odd" / f"{number}.png")
    config = IngestConfig(source=str(images), size=8, workers=1)
    undisturbed = tmp_path / "undisturbed" / "set"
    ingest(undisturbed, config)
    attempts: Counter[int] = Counter()
    tables: dict[str, int] = {}

    def unlucky(chunk: Chunk) -> str:
        attempts[chunk.first] += 1
        if chunk.first == 513 and attempts[chunk.first] == 1:
            raise ConnectionResetError("tried again where the chunk is prepared")
        if chunk.first == 1025 and attempts[chunk.first] == 1:
            raise RuntimeError("ends the stage")
        prepared = prepare_chunk(chunk)
        table = work_folder(tmp_path / "set") / "chunks" / f"{prepared}.parquet"
        assert tables.setdefault(prepared, table.stat().st_mtime_ns) == table.stat().st_mtime_ns
        return prepared

    def fan_out(_: object, chunks: Iterable[Chunk]) -> Iterator[str]:
        return make_fan_out(config)(unlucky, chunks)

    @retryable_task
    def make_dataset() -> IngestResult:
        return ingest(tmp_path / "set", config, fan_out=fan_out)

    @flow
    def make() -> IngestResult:
        return make_dataset()

    make()
    assert attempts == {1: 2, 513: 3, 1025: 2, 1537: 1}
    assert files_of(tmp_path / "set") == files_of(undisturbed)
    with get_client(sync_client=True) as client:
        [run] = client.read_task_runs()
    assert (run.name, run.run_count) == ("make dataset", 2)
