"""What a version was made from, also where what it was made from is deleted."""

import json
from pathlib import Path

from mlflow.client import MlflowClient

from flows.registry.model_versions import get_version
from flows.registry.takedown_marks import ancestors_tag, walk_lineage
from tests.builders.model_versions import add_version


def test_data_of_deleted_ancestors_stay_in_the_lineage(
    mlflow_client: MlflowClient, bucket: str, tmp_path: Path
) -> None:
    for number in (1, 2, 3, 4):
        tags = {"darkroom.dataset": "blobs", "darkroom.content_digest": str(number) * 64}
        if number > 1:
            parent = f"models:/{bucket}/{number - 1}"
            tags |= {"darkroom.start": parent, "darkroom.ancestors": ancestors_tag(mlflow_client, [parent]) or ""}
        add_version(mlflow_client, tmp_path, bucket, **tags)
    for number in (1, 2):
        mlflow_client.delete_model_version(bucket, str(number))
    last = get_version(mlflow_client, bucket, 4)
    assert [version.number for version in walk_lineage(mlflow_client, [last.uri])] == [4, 3]
    contents = json.loads(ancestors_tag(mlflow_client, [last.uri]) or "")
    assert contents == [[str(number) * 64, "blobs"] for number in (1, 2, 3, 4)]
    assert ancestors_tag(mlflow_client, [None]) is None
