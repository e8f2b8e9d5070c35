"""Choosing which checkpoints are evaluated in full: shorter rounds first, in which none is lost that is far ahead."""

import csv
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.common.fingerprint import fingerprint
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate, select_finalists
from diffusion.evaluation.metrics.scores import Scores
from diffusion.evaluation.results import CheckpointEvaluation
from diffusion.process.samplers import sampling_config
from tests.builders.comparisons import Watcher, evaluate_one
from tests.builders.small_models import write_model

CONFIG = EvaluationConfig(samples=48, first_samples=10, finalists=2, extractor_size=32)
SAMPLING = sampling_config(steps=3, compute_batch=10, precision="fp32")
MACHINE = fingerprint(64, "fp32", "cpu")


class Rounds:
    """Scores checkpoints as they are, the same in each round, and notes who was scored on how many images."""

    def __init__(self, kids: list[float]) -> None:
        self.kids = {Path(str(number)): kid for number, kid in enumerate(kids)}
        self.seen: dict[int, list[Path]] = {}

    def __call__(self, path: Path, samples: int) -> CheckpointEvaluation:
        self.seen.setdefault(samples, []).append(path)
        scores = Scores(
            extractor="x",
            samples=samples,
            reference=100,
            fd=1,
            kid=self.kids[path],
            kid_se=0,
            precision=0.5,
            recall=0.5,
            density=0.5,
            coverage=0.5,
        )
        return CheckpointEvaluation(
            file=str(path), sha256=str(path), images=int(str(path)), scores=scores, fingerprint=MACHINE
        )


def rows_of(table: Path) -> dict[int, dict[str, float]]:
    """By images seen."""
    with table.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return {int(row["images"]): row for row in rows}


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "run" / "checkpoints"
    return [write_model(folder / f"{images}.safetensors", images, images) for images in (300, 100, 500, 200, 400)]


@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=40, unique=True),
    st.integers(1, 6),
    st.none() | st.integers(10, 200),
    st.integers(10, 4000),
    st.integers(1, 500),
)
@example(kids=[0, 1, 0.5], count=1, first=None, samples=22, batch=1)
@example(kids=[0, 1], count=1, first=None, samples=20, batch=6)
def test_reliable_scores_select_the_best_finalists(
    kids: list[float], count: int, first: int | None, samples: int, batch: int
) -> None:
    assume(first is None or first < samples // 2)
    rounds = Rounds(kids)
    config = EvaluationConfig(samples=samples, first_samples=first, finalists=count)
    finalists, behind = select_finalists(list(rounds.kids), config, batch, rounds)
    best = sorted(rounds.kids, key=lambda path: rounds.kids[path])
    # Halves of fewer than ten images choose nothing.
    assert set(finalists) == set(best[: count if samples >= 20 else len(kids)])
    assert sorted([*map(str, finalists), *(each.file for each in behind)]) == sorted(map(str, rounds.kids))
    # Four times as many images each time, at last half of all but for whole batches.
    *others, last = rounds.seen or [samples // 2]
    assert others == [others[0] * 4**number for number in range(len(others))]
    assert not others or others[0] == first or (first is None and 10 * others[0] <= 11 * max(10, -(-samples // 4)))
    assert samples // 2 - batch < last <= 1.1 * (samples // 2)
    assert last == samples // 2 or last % batch == 0
    for images, checkpoints in rounds.seen.items():
        assert len(checkpoints) <= max(count + 1, len(kids) * min(rounds.seen) / images + 2)


def test_a_single_checkpoint_has_no_rounds() -> None:
    rounds = Rounds([0.1])
    assert select_finalists(list(rounds.kids), EvaluationConfig(), 64, rounds) == (list(rounds.kids), [])
    assert rounds.seen == {}


@pytest.mark.parametrize(("count", "expected"), [(2, {256: 2}), (3, {128: 3, 256: 2}), (40, {128: 40, 256: 10})])
def test_by_default_rounds_take_whole_batches_up_to_half_of_images(count: int, expected: dict[int, int]) -> None:
    rounds = Rounds([0.1 * number for number in range(count)])
    finalists, behind = select_finalists(list(rounds.kids), EvaluationConfig(), 64, rounds)
    assert {samples: len(checkpoints) for samples, checkpoints in rounds.seen.items()} == expected
    assert (len(finalists), len(behind)) == (1, count - 1)


def test_preliminary_rounds_as_large_as_the_evaluation_are_an_error() -> None:
    with pytest.raises(ValidationError, match="first_samples = 250"):
        EvaluationConfig(first_samples=250)


@pytest.mark.slow
def test_eliminated_checkpoints_are_marked_and_never_best(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    assert len(evaluation.checkpoints) == 2
    assert len(evaluation.preliminary) == 3
    assert evaluation.choosing_samples == 48  # the two in full were compared on all
    assert evaluation.best in evaluation.checkpoints
    assert sorted(each.scores.samples for each in evaluation.preliminary) == [10, 10, 20]
    assert {each.scores.samples for each in evaluation.checkpoints} == {48}
    in_full, behind = (rows_of(tmp_path / "report" / f"{name}.csv") for name in ("scores", "preliminary"))
    assert list(in_full) == [each.images for each in evaluation.checkpoints]
    assert list(behind) == [each.images for each in evaluation.preliminary]
    for each in evaluation.preliminary:
        assert behind[each.images] == each.selection_metric.metrics() | {"images": each.images}
        assert (each.selection_metric.name, each.selection_metric.count) == ("kid_efflite0", each.scores.samples)
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("not evaluated in full</span>") == 3
    assert "3 more checkpoints fell behind on fewer images, from 10 on, and were not evaluated in full." in page


@pytest.mark.slow
def test_a_finalist_has_the_scores_that_it_has_without_rounds(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    alone = CONFIG.model_copy(update={"first_samples": None, "finalists": 4})
    best = evaluate_one(Path(evaluation.best.file), dataset, alone, SAMPLING, tmp_path / "other")
    assert best == evaluation.best
    watcher = Watcher()
    # Remembered, as rounds change no score: only those that were not evaluated in full are sampled.
    again = evaluate(
        dataset, checkpoints, alone.model_copy(update={"finalists": 5}), SAMPLING, tmp_path / "report", progress=watcher
    )
    assert watcher.sampled_models == {Path(each.file).stem for each in evaluation.preliminary}
    assert again.preliminary == []
    assert not (tmp_path / "report" / "preliminary.csv").exists()


@pytest.mark.slow
def test_interrupted_selection_round_resumes_to_the_same_result(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    whole = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "cut", progress=Watcher("500: images sampled"))
    watcher = Watcher()
    assert evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "cut", progress=watcher) == whole
    assert not {"300", "100"} <= watcher.sampled_models
    pages = [(tmp_path / name / "report.html").read_bytes() for name in ("whole", "cut")]
    assert pages[0] == pages[1]
