from pathlib import Path

import pytest

from tests.builders.comparisons import discs
from tests.builders.small_models import write_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discs(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A candidate and a champion."""
    return [write_model(tmp_path / f"{name}.safetensors", seed, seed) for seed, name in enumerate(("new", "old"), 1)]
