"""What ``darkroom server health`` finds of S3 servers that ignore conditions, and what refuses to begin on them."""

import pytest

from diffusion.common.errors import UserError
from flows import ingest, train
from flows.config import Params
from flows.local_stack.http_api import check
from flows.storage.s3 import Store
from tests.builders.s3_proxy import Request, proxied

PARAMS = Params.model_validate({"training": {"dataset": "blobs", "images": 320}})


def ignoring_all_conditions(request: Request) -> None:
    """As servers from before 2024 do."""
    del request.headers["If-None-Match"]


def read_only(request: Request) -> str | None:
    """Keys that may not write."""
    return "AccessDenied" if request.method in {"PUT", "POST", "DELETE"} else None


@pytest.fixture
def here(s3_environment: dict[str, str], bucket: str) -> dict[str, str]:
    """The server of this process, with a bucket that it uses."""
    return s3_environment


def test_fully_conditional_s3_server_passes_the_check_silently(here: dict[str, str]) -> None:
    assert check("s3") == []


def test_s3_that_cannot_be_tested_is_one_line(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(here, read_only) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        [line] = check("s3")
    assert "may not write" in line
    assert "\n" not in line


def test_s3_without_conditional_writes_fails_before_any_work(
    here: dict[str, str], store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxied(here, ignoring_all_conditions) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        for begin in (
            lambda: check("s3"),
            lambda: ingest.repair.fn(PARAMS, "never", False),
            lambda: train.train.fn(PARAMS),
        ):
            with pytest.raises(UserError, match="ignores the condition If-None-Match") as refusal:
                begin()
            assert "\n" not in str(refusal.value)
    assert not [key for key in store.list_keys(bucket) if not key.endswith(".darkroom-conditional-put")]
