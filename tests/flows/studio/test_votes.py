"""Blind votes between two registered versions, without a browser."""

from pathlib import Path

import pytest
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.process.samplers import sampling_config
from flows.registry.model_versions import Version

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.votes import VOTES, VoteSession, cast, load_version, open_ballot

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)


def test_votes_are_blind_and_recorded_on_the_candidate(
    mlflow_client: MlflowClient, versions: list[Version], bucket: str
) -> None:
    ballot = open_ballot(bucket, 2, 1, {"label": "odd", "seed": 5, "count": 3}, SAMPLING)
    source = load_version(f"models:/{bucket}/1", SAMPLING)
    shown = source.generate({"task": "sample", "seed": 5, "count": 3, "label": "odd"})
    assert [Image.open(path).tobytes() for path in shown.paths] == [
        each.tobytes() for each in ballot.images["candidate"]
    ]
    images = [image for each in ballot.images.values() for image in each]
    assert len({image.tobytes() for image in images}) == 6
    assert not any(image.info for image in images)  # which would name the version
    preferred = {"candidate": 0, "champion": 0}
    for side in ("left", "right"):
        preferred[ballot.session.sides(ballot.pair or 0)[side]] += 1  # type: ignore[index]
        ballot, tally = cast(ballot, side)  # type: ignore[arg-type]
    ballot, tally = cast(ballot, "equal")
    assert ballot.pair is None
    expected = f"candidate {preferred['candidate']}, champion {preferred['champion']} (version 2), no difference 1"
    assert tally == expected
    assert mlflow_client.get_model_version(bucket, "1").tags[VOTES] == expected
    # What another person votes is added, and what was cast can be read again.
    other, _ = cast(open_ballot(bucket, 2, 1, {"seed": 6, "count": 2}, SAMPLING), "equal")
    assert mlflow_client.get_model_version(bucket, "1").tags[VOTES].endswith("no difference 2")
    assert VOTES not in mlflow_client.get_model_version(bucket, "2").tags
    record = Path(mlflow_client.download_artifacts(versions[0].run_id, ballot.session.artifact)).read_text()
    assert VoteSession.model_validate_json(record) == ballot.session
    assert other.session.shuffle_seed != ballot.session.shuffle_seed
    with pytest.raises(UserError):
        open_ballot(bucket, 2, 2, {}, SAMPLING)


def test_sides_are_shuffled_evenly_by_the_recorded_seed() -> None:
    sides = {"sampling": {"candidate": SAMPLING, "champion": SAMPLING}, "conditions": {}, "model": "m"}
    session = VoteSession.model_validate(
        {**sides, "champion": 1, "candidate": 2, "seed": 0, "shuffle_seed": 3}, from_attributes=True
    )
    left = [session.sides(pair)["left"] for pair in range(1000)]
    # Binomial: 3.3 standard deviations.
    assert abs(left.count("candidate") - 500) < 52
    assert left == [session.model_copy().sides(pair)["left"] for pair in range(1000)]
    assert left != [session.model_copy(update={"shuffle_seed": 4}).sides(pair)["left"] for pair in range(1000)]
