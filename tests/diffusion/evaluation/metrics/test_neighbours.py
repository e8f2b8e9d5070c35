"""Nearest neighbours in blocks against scikit-learn's of all at once."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from diffusion.evaluation.metrics import neighbours as module
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest, find_nearly_nearest


def points(count: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 500, 2**24])
@pytest.mark.parametrize("piece", [3, 40, 130])
def test_they_equal_an_exhaustive_search_in_any_blocks(piece: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_DISTANCES", block)
    queries, rows = points(70, 0), points(130, 1)
    neighbours = find_nearest(queries, torch.split(rows, piece), count=5)
    distances, numbers = NearestNeighbors(n_neighbors=5).fit(rows.numpy()).kneighbors(queries.numpy())
    assert np.array_equal(neighbours.rows, numbers)
    np.testing.assert_allclose(neighbours.distances, distances, atol=1e-3)


def test_among_themselves_none_is_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_DISTANCES", 600)
    queries = points(90, 0)
    neighbours = find_nearest(queries, torch.split(queries, 40), count=4, themselves=True)
    distances, numbers = NearestNeighbors(n_neighbors=4).fit(queries.numpy()).kneighbors()
    assert np.array_equal(neighbours.rows, numbers)
    np.testing.assert_allclose(neighbours.distances, distances, atol=1e-3)


def test_of_several_views_the_nearest_counts() -> None:
    rows, far = points(50, 1), points(10, 2) + 10
    neighbours = find_nearest(torch.stack([far, rows[:10], far]), [rows], count=3)
    assert neighbours.rows[:, 0].tolist() == list(range(10))
    assert neighbours.distances[:, 0].max() < 0.05
    assert neighbours.distances[:, 1].min() > 0.1


def test_where_there_are_fewer_rows_all_are_neighbours() -> None:
    assert find_nearest(points(5, 0), [points(3, 1)]).rows.sort(1).values.tolist() == [[0, 1, 2]] * 5
    assert find_nearest(points(3, 0), [points(3, 0)], themselves=True).rows.shape == (3, 2)


def test_the_nearest_is_measured_by_how_dense_it_is_there() -> None:
    neighbours = NearestNeighbours(torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 5.0], [0.0, 0.0, 0.0]]), torch.zeros(3, 3))
    assert neighbours.relative.tolist() == [0.5, 0.0, 0.0]


def test_copies_are_among_nearly_nearest_with_any_number_of_threads() -> None:
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(1500, 16, generator=generator)
    copies = originals + 0.01 * torch.randn(1500, 16, generator=generator)
    far = torch.full_like(originals, 50.0)
    neighbours = find_nearly_nearest(torch.stack([far, originals]), torch.cat([originals, copies]), 5)
    assert (neighbours.rows[:, 0] == torch.arange(1500)).all()
    assert (neighbours.rows == torch.arange(1500, 3000)[:, None]).any(1).float().mean() > 0.99
    assert all(len(set(row)) == 5 for row in neighbours.rows.tolist())
    faiss.omp_set_num_threads(3)
    again = find_nearly_nearest(torch.stack([far, originals]), torch.cat([originals, copies]), 5)
    assert torch.equal(again.rows, neighbours.rows)
    assert torch.equal(again.distances, neighbours.distances)
