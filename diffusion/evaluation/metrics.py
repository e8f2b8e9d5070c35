"""Distances between two sets of pictures, by torch-fidelity's formulas on our features.

Every score carries the name of its features (``fd_efflite0``), for "FID" without more means Inception-v3.

Small samples: the Fréchet distance is biased upwards by about 1/n, and with fewer pictures than features
its covariances are singular. Two halves of the same real set are then far from 0, the more so the
smaller n. KID is unbiased at any n. So under 5,000 pictures KID leads, and every score is read beside
its floor: what real pictures get, as many of them, against the same reference.
"""

import math

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from diffusion.config import Config

SUBSETS_SEED = 2020
"""Of KID's subsets: torch-fidelity's own default, part of what its figures mean."""
NEIGHBOURS = 3
"""k of precision and recall's neighbourhoods (arXiv 1904.06991)."""
DISTANCES_BATCH = 2048
"""Rows and columns per block of pairwise distances."""


class Scores(Config):
    """How far one set of pictures lies from a reference set, and on how many pictures that rests."""

    extractor: str
    """Name of the features."""
    samples: int
    """Pictures judged."""
    reference: int
    """Real pictures they were compared with."""
    fd: float
    """Fréchet distance of two Gaussians fitted to the features (arXiv 1706.08500); 0 is best."""
    kid: float
    """Squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (arXiv 1801.01401), unbiased: 0 is
    best, and may come out slightly negative. Mean over random subsets."""
    kid_std: float
    """Standard deviation over the subsets: of an estimate from ``kid_subset_size`` pictures a side."""
    kid_se: float
    """Standard error of ``kid`` itself, over new draws of both sets."""
    kid_subset_size: int
    """Pictures per subset, of each side."""
    precision: float
    """Share of the judged pictures that lie among the reference (fidelity), 0 to 1."""
    recall: float
    """Share of the reference that lies among the judged pictures (variety), 0 to 1."""

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are, such as ``kid_efflite0``."""
        figures = self.model_dump(include={"fd", "kid", "kid_std", "kid_se", "precision", "recall"})
        counts = {"samples": self.samples, "reference": self.reference}
        return {f"{name}_{self.extractor}": value for name, value in figures.items()} | counts


def judge(
    samples: Tensor, reference: Tensor, extractor: str, kid_subsets: int = 100, kid_subset_size: int = 1000
) -> Scores:
    """Compare features (N, D) of judged pictures with those (M, D) of real ones; N and M at least 10.

    KID's subsets hold ``kid_subset_size`` pictures, at most half of the smaller side: a subset of all
    would be the same each time, and its spread zero.
    """
    smaller = min(len(samples), len(reference))
    size = min(kid_subset_size, smaller // 2)
    kid = kid_features_to_metric(
        samples,
        reference,
        kid_subsets=kid_subsets,
        kid_subset_size=size,
        rng_seed=SUBSETS_SEED,
        verbose=False,
    )
    neighbours = prc_features_to_metric(
        samples,
        reference,
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=DISTANCES_BATCH,
        save_cpu_ram=True,
        verbose=False,
    )
    return Scores(
        extractor=extractor,
        samples=len(samples),
        reference=len(reference),
        fd=frechet_distance(samples, reference),
        kid=kid[KEY_METRIC_KID_MEAN],
        kid_std=kid[KEY_METRIC_KID_STD],
        kid_se=standard_error(kid[KEY_METRIC_KID_STD], size, smaller),
        kid_subset_size=size,
        precision=neighbours[KEY_METRIC_PRECISION],
        recall=neighbours[KEY_METRIC_RECALL],
    )


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Of Gaussians fitted to features (N, D) and (M, D) (arXiv 1706.08500)."""
    moments = [fid_features_to_statistics(features) for features in _in_their_span(samples, reference)]
    distance: float = fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]
    return distance


def _in_their_span(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in an orthonormal basis of their common span, where fewer pictures than features span less.

    Means and covariances lie in it, so the Fréchet distance is the same, from smaller matrices.
    """
    both = torch.cat([samples, reference]).double()
    if len(both) >= both.shape[1]:
        return samples, reference
    basis = torch.linalg.qr(both.T).Q
    first, second = (both @ basis).split([len(samples), len(reference)])
    return first, second


def standard_error(subset_std: float, size: int, count: int) -> float:
    """Standard error of a U-statistic of ``count`` pictures, from its spread over subsets of ``size``.

    The delete-d jackknife (Shao and Wu, Ann. Statist. 17, 1989). Subsets overlap, so their
    spread divided by the root of their number would only be the error of the drawing. But
    E[Var over subsets] = V(size) − V(count) exactly, where V(n) is the variance of an estimate from n
    pictures. V falls as 1/n where the sets differ, which gives the factor below; where they are equal
    it falls as 1/n² and the error returned is too large, at halves by √3. It is never too small.
    """
    return subset_std * math.sqrt(size / (count - size))
