"""A data set in a catalog, for the tests of data sets in operation."""

from pathlib import Path

import pytest
from dvc.repo import Repo

from tests.builders.catalogs import Place


@pytest.fixture
def place(bucket: str, images: Path) -> Place:
    Repo.init(no_scm=True).close()
    return Place(bucket, images)
