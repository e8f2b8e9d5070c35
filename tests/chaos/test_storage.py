"""S3 fails, and what comes from outside is not to be trusted: ``retrain`` ends right, or says in a line why not."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from diffusion.common.files import sha256_bytes
from diffusion.data.manifest import read_manifest
from flows.storage.s3 import Object
from tests.builders.ingested import files_of
from tests.chaos.conftest import Undisturbed
from tests.chaos.faulty_proxy import Fault, FaultyProxy
from tests.chaos.house import NIGHT, House, Site, expect_exit
from tests.chaos.poison import poison

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAINING = "diffusion.training.checkpointing:Checkpoints.save@3"


@contextmanager
def through(site: Site, fault: Callable[[int, str], Fault | None]) -> Iterator[FaultyProxy]:
    """Inside, what ``site`` starts reaches S3 through a proxy, with keys of its own."""
    direct = site.variables
    proxy = FaultyProxy(direct["AWS_ENDPOINT_URL_S3"], fault)
    site.variables = direct | NIGHT | {"AWS_ENDPOINT_URL_S3": proxy.url}
    try:
        yield proxy
    finally:
        proxy.close()
        site.variables = direct


@pytest.mark.drill
def test_requests_are_retried_when_s3_is_busy_slow_or_disconnects(site: Site, undisturbed: Undisturbed) -> None:
    course = [Fault.BUSY, None, Fault.RESET, None, None, Fault.UNANSWERED, None, Fault.SLOW, None, None, Fault.CUT]
    with through(site, lambda number, _: course[number % len(course)]) as proxy:
        result = site.json(*site.retraining)
    assert min(Counter(proxy.met).values()) >= 5
    assert site.end(result) == undisturbed.end


@pytest.mark.drill
@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.DENIED])
def test_rejecting_s3_server_is_one_line_and_resumed(site: Site, undisturbed: Undisturbed, fault: Fault) -> None:
    words = {Fault.BUSY: (1, "SlowDown"), Fault.DENIED: (2, "denies access")}
    code, expected = words[fault]

    def no_samples(_: int, line: str) -> Fault | None:
        return fault if line.startswith("PUT") and f"/samples/{site.name}/" in line else None

    with through(site, no_samples):
        assert expected in expect_exit(site.start(*site.retraining), code)
    assert site.end(site.json(*site.retraining)) == undisturbed.end


@pytest.mark.drill
def test_a_body_that_ends_early_is_never_taken_as_whole(
    house: House, site: Site, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    version = site.json("ingest", str(house.images), "--dataset", site.name)["digest"]
    expected = files_of(site.folder / "data" / site.name)
    place = f"source/{site.name}"
    house.store.put_many(
        house.stack.bucket,
        [Object(f"{place}/{path.relative_to(house.images)}", path.read_bytes()) for path in house.images.rglob("*.*")],
    )
    checkout = ("data", "checkout", version, "--dataset", site.name)
    cut = set[str]()

    def cut_body(_: int, line: str) -> Fault | None:
        if not line.startswith("GET") or not ("/dvc/" in line or f"/{place}/" in line):
            return None
        if name == "first" and line in cut:
            return None
        cut.add(line)
        return Fault.CUT

    for name in ("first", "every"):
        machine = house.site(tmp_path / name / site.name)
        ingest = ("ingest", f"s3://{house.stack.bucket}/{place}", "--dataset", f"{site.name}-{name}")
        with through(machine, cut_body) as proxy:
            if name == "every":
                for command in (checkout, ingest):
                    expect_exit(machine.start(*command), 1)
                assert not list((machine.folder / "data").glob("*/manifest.json"))
                assert not house.objects(f"datasets/{site.name}-{name}/")
            else:
                machine.run(*checkout)
                assert machine.json(*ingest)["content_digest"] == undisturbed.end["content"]
        assert proxy.met.count(Fault.CUT) >= 2
        machine.run(*checkout)
        assert files_of(machine.folder / "data" / site.name) == expected
        assert machine.json(*ingest)["content_digest"] == undisturbed.end["content"]


@pytest.mark.drill
def test_revoked_keys_are_one_line_and_new_keys_resume(house: House, site: Site, undisturbed: Undisturbed) -> None:
    own = site.variables
    site.variables = own | NIGHT
    with site.paused(TRAINING) as process:
        house.admit()
    line = expect_exit(process, 2)
    assert "rejects the credentials" in line
    assert "AWS_ACCESS_KEY_ID" in line
    assert NIGHT["AWS_SECRET_ACCESS_KEY"] not in line
    house.admit(NIGHT)
    assert site.end(site.json(*site.retraining)) == undisturbed.end


@pytest.mark.drill
def test_files_that_are_not_images_are_quarantined_with_a_reason(house: House, undisturbed: Undisturbed) -> None:
    reasons = undisturbed.done["data"]["result"]["quarantined"]
    assert sorted(Path(each["source"]).name for each in reasons) == [
        "bomb.png", "cut.png", "empty.png", "page.jpg", "pickle.png",
    ]  # fmt: skip
    assert all(each["reason"] for each in reasons)
    assert undisturbed.done["data"]["result"]["kept"] == 120
    assert undisturbed.end["whole"]
    assert not (house.workspace.folder / "unpickled").exists()


@pytest.mark.drill
def test_folder_without_any_image_fails_and_leaves_nothing(house: House, site: Site) -> None:
    poison(site.folder / "images", site.folder / "unpickled")
    line = expect_exit(site.start("retrain", "images", "--dataset", site.name), 2)
    assert "no usable image in images: all 5" in line
    assert not (site.folder / "unpickled").exists()
    assert not (site.folder / "data" / site.name).exists()
    for place in ("datasets", "pushing", "ledger", "samples", "retrained"):
        assert not house.objects(f"{place}/{site.name}/")


@pytest.mark.drill
def test_a_damaged_remote_shard_is_named_and_mended(
    house: House, site: Site, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # Others have the same shards, as they are named by content: these here are of another size.
    ingest = ("ingest", str(house.images), "--dataset", site.name, "--set", "ingest.size=10")
    version = site.json(*ingest)["digest"]
    [shard] = read_manifest(site.folder / "data" / site.name).shards
    remote = house.objects("dvc/files/md5/")
    [key] = [key for key, data in remote.items() if sha256_bytes(data) == shard.sha256]
    client = boto3.client("s3", endpoint_url=house.workspace.variables["AWS_ENDPOINT_URL_S3"])
    place = {"Bucket": house.stack.bucket, "Key": f"dvc/files/md5/{key}"}
    client.put_object(**place, Body=bytes(512) + remote[key][512:])

    other = house.site(tmp_path / "elsewhere" / site.name)
    checkout = ("data", "checkout", version, "--dataset", site.name)
    line = expect_exit(other.start(*checkout), 2)
    assert shard.name in line
    assert f"delete s3://{place['Bucket']}/{place['Key']}" in line
    assert not (other.folder / "data" / site.name / "manifest.json").exists()

    client.delete_object(**place)
    site.json(*ingest)
    assert house.objects("dvc/files/md5/")[key] == remote[key]
    other.run(*checkout)
    assert read_manifest(other.folder / "data" / site.name).digest == version
