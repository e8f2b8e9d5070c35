"""A bucket of 20,000 objects: the requests of a command grow with the pages of its listings, and not with objects."""

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.storage.s3 import Object
from tests.builders.forked import Forks
from tests.chaos.faulty_proxy import FaultyProxy
from tests.chaos.house import House, own_stores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

IMAGES, OTHERS = 8_000, 12_000
"""Objects of a sampling batch, and of DVC's remote, which are of no version."""
PAGE = 1_000
"""Objects in a page of a listing, and in a request that deletes."""
MAX_LISTINGS = 4
"""How often a command may go through all objects."""


class Shop:
    """A machine with a bucket and an MLflow of its own, whose requests to S3 are counted."""

    def __init__(self, house: House, forks: Forks, folder: Path) -> None:
        self.site, self.forks, self.store = house.site(folder), forks, house.store
        self.bucket = f"test-{uuid4().hex}"
        self.variables = own_stores(folder, self.bucket)
        self.store.ensure_bucket(self.bucket)

    def json(self, *arguments: str, **variables: str | None) -> Any:
        """The result of a command."""
        return json.loads(self.forks.finish(self.site.folder, *arguments, "--json", **self.variables | variables))

    def count(self, *arguments: str) -> tuple[int, Any]:
        """How many requests a command makes, and its result."""
        requests = list[str]()
        # It answers nothing itself, and so hands every request on.
        with closing(
            FaultyProxy(self.site.variables["AWS_ENDPOINT_URL_S3"], lambda _, line: requests.append(line))
        ) as proxy:
            # Beside a local stack, an address of loopback with its password is taken for an old one of that stack.
            elsewhere = {"AWS_ENDPOINT_URL_S3": proxy.url, "DARKROOM_HOME": str(self.site.folder / "elsewhere")}
            result = self.json(*arguments, **elsewhere)
        return len(requests), result

    def look(self, image: str) -> dict[str, int]:
        """How many requests each command makes that looks at the bucket; ``image`` is the address of a sample."""
        copy = self.site.folder / "copy.png"
        bucket, _, key = image.removeprefix("s3://").partition("/")
        copy.write_bytes(self.store.get(bucket, key))
        counts = dict[str, int]()
        commands = {
            "gc --dry-run": ("gc", "--dry-run"),
            "gc": ("gc",),
            "ls": ("ls", "batches"),
            "data log": ("data", "log"),
            "model history": ("model", "history"),
            "trace on S3": ("trace", image),
            "trace of a copy": ("trace", str(copy)),
        }
        for name, command in commands.items():
            counts[name], result = self.count(*command)
            if command[0] == "trace":
                assert result["broken"] == []
                assert result["finished"]
        return counts


@pytest.mark.drill
def test_requests_grow_with_pages_and_not_with_objects(house: House, forks: Forks, tmp_path: Path) -> None:
    shop = Shop(house, forks, tmp_path / "shop")
    few = shop.json(*shop.site.retraining)["samples"]["uri"]
    before = shop.look(f"{few}00000003.png")
    quick = ("--set", "sampling.steps=2", "--set", "sampling.compute_batch=500")
    many = shop.json("sample", "--count", str(IMAGES), *quick)["uri"]
    names = [hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest() for number in range(OTHERS)]
    objects = [Object(f"dvc/files/md5/{name[:2]}/{name[2:]}", name.encode()) for name in names]
    shop.store.put_many(shop.bucket, objects, workers=32)
    pages = (IMAGES + OTHERS) // PAGE
    after = shop.look(f"{many}00007654.png")
    assert all(before.values()), before  # every command asks S3
    for command, count in after.items():
        assert count <= before[command] + MAX_LISTINGS * pages, command
    assert after["gc"] >= before["gc"] + IMAGES // PAGE  # it has seen them
    [row] = [row for row in shop.json("ls", "batches")["batches"] if row["name"] == many]
    assert (row["images"], row["state"]) == (IMAGES, "finished")

    strict = ("--set", "retention.batch_days=0", "--set", "retention.grace_hours=0")
    deleted, result = shop.count("gc", *strict)
    assert {item["action"] for item in result["items"] if item["kind"] == "sampling batches"} == {"set aside"}
    # But for the object by which it learned what the server can do.
    assert list(shop.store.list_keys(shop.bucket, "samples/")) == ["samples/.darkroom-conditional-put"]
    assert deleted <= after["gc"] + MAX_LISTINGS * pages
    # Nothing of what it does not know.
    assert len(list(shop.store.list_keys(shop.bucket, "dvc/"))) > OTHERS
