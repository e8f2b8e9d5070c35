"""Every pair of commands that write, begun at once in one folder: each does its work or says in a line why not."""

import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.client import MlflowClient

from diffusion.common.files import sha256_bytes, sha256_file
from diffusion.data.manifest import read_manifest
from flows.local_stack.backup import Backups
from flows.registry.model_versions import WEIGHTS
from tests.builders.forked import Fork, Forks
from tests.builders.ingested import files_of
from tests.builders.shapes import disc
from tests.builders.small_models import write_model
from tests.builders.training_runs import MODEL
from tests.chaos.house import QUICK, House, Site, stack_alone

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

VERBS = (
    *("ingest", "train", "evaluate", "promote", "sample", "retrain", "gc"),
    *("takedown", "sweep", "import", "backup"),
)
PAIRS = list(combinations_with_replacement(VERBS, 2))
BEFORE = {"evaluate": ("train",), "promote": ("train", "evaluate")}
"""Commands whose results others need."""
GATED = {"promote", "retrain"}
"""Commands that end with code 3 where the gate decides against a model."""
CHANGES_DATA = {"ingest", "retrain", "takedown"}
BRIEF = {"images": 64, "checkpoints": 1, "keep": 1}
RETENTION = {"data_versions": 1, "data_days": 0, "batch_days": 0, "cache_days": 0}
GC = ("gc", *(word for name, value in RETENTION.items() for word in ("--set", f"retention.{name}={value}")))
"""As gc is run beside others: what nobody needs is set aside, and nothing of the last day is deleted."""


@dataclass
class Pairs:
    """A folder with a champion and a backup, in which one pair of commands follows the other."""

    site: Site
    forks: Forks
    backups: Path

    def start(self, verb: str, number: int) -> Fork:
        """Begin the command ``verb`` of pair ``number``."""
        variables = stack_alone(self.site.house.stack.folder) if verb == "backup" else {}
        return self.forks.start(self.site.folder, *self.command(verb, number), "--json", **variables)

    def command(self, verb: str, number: int) -> tuple[str, ...]:
        """The command of pair ``number``, which finds something to do."""
        own = ("--set", f"training.seed={number}", "--set", f"training.output=runs/{number}")
        return {
            "ingest": ("ingest", "images"),
            "train": ("train", *own, "--restart-if-different"),
            "evaluate": ("evaluate", *own),
            "promote": ("promote", *own),
            "sample": ("sample", "--count", "8", "--seed", str(number)),
            "retrain": ("retrain", "images", *own, "--count", "2"),
            "gc": GC,
            "takedown": ("data", "remove", f"first/{number}.png", "--reason", "asked to", "--purge", "--yes"),
            "sweep": ("sweep", "--over", f"training.seed={1000 + number},{2000 + number}"),
            "import": ("model", "import", f"{number}.safetensors", "--name", self.site.name, "--licence", "MIT"),
            "backup": ("server", "backup", str(self.backups)),
        }[verb]

    def prepare(self, verbs: tuple[str, ...], number: int) -> None:
        """Put there what the commands of pair ``number`` find to do."""
        folder = self.site.folder
        disc(1000 + number).save(folder / "images" / "later" / f"{number}.png")
        if "import" in verbs:
            write_model(folder / f"{number}.safetensors", number, 9, config=MODEL, classes={"first": 9, "later": 9})
        self.before(verbs, number)

    def before(self, verbs: tuple[str, ...], number: int) -> None:
        """Do what the commands of pair ``number`` need."""
        for verb in dict.fromkeys(earlier for each in verbs for earlier in BEFORE.get(each, ())):
            self.finish(verb, number)

    def finish(self, verb: str, number: int) -> Any:
        """The result of the command, which must do its work; the gate may decide against a model."""
        process = self.start(verb, number)
        out, errors = process.communicate(timeout=900)
        assert process.returncode == 0 or (process.returncode == 3 and verb in GATED), f"{verb}: {errors[-6000:]}"
        return json.loads(out)

    def at_once(self, verbs: tuple[str, ...], number: int) -> None:
        """Begin both, the second within a second, and look at how each ends."""
        moments, processes = random.Random(number), []
        for verb in moments.sample(verbs, 2):
            processes.append((verb, self.start(verb, number)))
            time.sleep(moments.uniform(0, 1))
        for verb, process in processes:
            _, errors = process.communicate(timeout=900)
            assert process.returncode in (0, 2, 3), f"{verb}: {process.returncode}: {errors[-6000:]}"
            assert "Traceback" not in errors, f"{verb}: {errors[-6000:]}"
            lines = [line for line in errors.splitlines() if line.startswith("darkroom: ")]
            # The gate gives its reason in the result.
            decided = process.returncode == 0 or (process.returncode == 3 and verb in GATED)
            assert len(lines) == 1 or decided, f"{verb}: {errors[-6000:]}"

    def check(self, verbs: tuple[str, ...], number: int) -> None:
        """Look at all that there is: one champion, versions whole, data that its manifest describes."""
        site, client = self.site, MlflowClient(self.site.variables["MLFLOW_TRACKING_URI"])
        history = json.loads(self.forks.finish(site.folder, "model", "history", "--json"))
        assert history["problem"] is None
        champion = client.get_model_version_by_alias(site.name, "champion")
        assert history["champion"] == int(champion.version)
        versions = client.search_model_versions(f"name='{site.name}'")
        digests = [version.tags[WEIGHTS] for version in versions]
        assert len(set(digests)) == len(digests)
        self.check_weights(client, set(digests))
        folder = site.folder / "data" / site.name
        assert all(sha256_file(folder / entry.name) == entry.sha256 for entry in read_manifest(folder).files)
        if CHANGES_DATA & set(verbs):
            elsewhere = site.house.site(site.folder.parent / f"elsewhere-{number}" / site.name).folder
            self.forks.finish(elsewhere, "data", "checkout", read_manifest(folder).digest)
            assert files_of(elsewhere / "data" / site.name) == files_of(folder)
        if "takedown" in verbs:
            names = [row["source"] for row in self.records()]
            assert not any(name.endswith(f"first/{number}.png") for name in names)
        if "backup" in verbs:
            backup = Backups(self.backups).read()
            for sha256 in (*(each.sha256 for each in backup.objects), *backup.databases.values()):
                assert sha256_file(Backups(self.backups).path(sha256)) == sha256

    def records(self) -> Iterator[dict[str, Any]]:
        """Images of the data set."""
        folder = self.site.folder / "data" / self.site.name
        for part in read_manifest(folder).parts:
            rows = pq.read_table(folder / part.records.name).to_pylist()
            yield from (row for row in rows if row["outcome"] == "kept")

    def check_weights(self, client: MlflowClient, digests: set[str]) -> None:
        """Require that the weights of all versions lie on S3, whole, and each once."""
        experiment = client.get_experiment_by_name(self.site.name)
        store, bucket = self.site.house.store, self.site.house.stack.bucket
        keys = [
            key
            for key in store.list_keys(bucket, f"mlflow/{experiment.experiment_id}/models/")
            if key.endswith("/weights.safetensors")
        ]
        found = [sha256_bytes(store.get(bucket, key)) for key in keys]
        assert digests <= set(found)
        assert all(found.count(digest) == 1 for digest in digests)


@pytest.fixture(scope="module")
def pairs(house: House, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A folder with a champion."""
    folder = tmp_path_factory.mktemp("pairs")
    site = house.site(folder / folder.name)
    parts = QUICK | {"training": {**QUICK["training"], **BRIEF, "dataset": site.name}}
    (site.folder / "params.yaml").write_text(yaml.safe_dump(parts))
    for name, numbers in {"images/first": range(200), "images/later": range(200, 240)}.items():
        (site.folder / name).mkdir(parents=True)
        for number in numbers:
            disc(number).save(site.folder / name / f"{number}.png")
    new_pairs = Pairs(site, forks, folder / "backups")
    forks.finish(site.folder, "retrain", "images", "--count", "1")
    return new_pairs


@pytest.mark.drill
@pytest.mark.parametrize("number", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_two_commands_at_once_work_or_say_why_not(pairs: Pairs, number: int) -> None:
    verbs = PAIRS[number]
    pairs.prepare(verbs, number)
    pairs.at_once(verbs, number)
    for verb in dict.fromkeys(verbs):
        # The other command may have changed the data set that this one's inputs are of.
        pairs.before((verb,), number)
        result = pairs.finish(verb, number)
        if verb == "sample":
            check_batch(pairs.site, result["uri"])
    pairs.check(verbs, number)


def check_batch(site: Site, uri: str) -> None:
    """Require that a batch has all its images."""
    contents = site.house.objects(uri.removeprefix(f"s3://{site.house.stack.bucket}/"))
    rows = pq.read_table(io.BytesIO(contents["manifest.parquet"])).to_pylist()
    assert "_SUCCESS" in contents
    assert [sha256_bytes(contents[row["key"]]) for row in rows] == [row["sha256"] for row in rows]
    assert len(rows) == 8
