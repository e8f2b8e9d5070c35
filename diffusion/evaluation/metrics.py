"""Distances between two sets of pictures, equal to torch-fidelity's where it has them, on features of choice.

(Its KID is a mean over random subsets: equal where one subset has all pictures, and else what that mean tends to.)

Every score carries the name of its features (``fd_efflite0``), for "FID" without more means Inception-v3.

Small samples: the Fréchet distance is biased upwards by about 1/n, and with fewer pictures than features
its covariances are singular. Two halves of the same real set are then far from 0, the more so the
smaller n. KID is unbiased at any n. So under 5,000 pictures KID leads, and every score is read beside
its floor: what real pictures get, as many of them, against the same reference. Where there are pictures enough, four
for each feature, the distance is also given as it would be of endlessly many.
"""

from pydantic import Field
from torch import Tensor

from diffusion.config import Config, unset
from diffusion.evaluation.kid import kid
from diffusion.evaluation.moments import distance, distance_at_infinity, moments
from diffusion.evaluation.neighbours import nearest, overlap
from diffusion.evaluation.reference import Reference

FIGURES = ("fd", "fd_infinity", "kid", "kid_se", "precision", "recall", "density", "coverage")
"""The figures, in the order in which they are shown."""


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
    """Squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (arXiv 1801.01401), unbiased, over all
    pairs: 0 is best, and it may come out slightly negative."""
    kid_se: float
    """Standard error of ``kid``, over new draws of both sets."""
    precision: float
    """Share of the judged pictures that lie among the reference (fidelity), 0 to 1 (arXiv 1904.06991, k = 3)."""
    recall: float
    """Share of the reference that lies among the judged pictures (variety), 0 to 1 (likewise)."""
    density: float
    """How many of the reference the judged pictures lie among (fidelity, and unlike precision not led astray by
    outliers), 0 and more, of real pictures about 1 (arXiv 2002.09797, k = 5)."""
    coverage: float
    """Share of the reference that has a judged picture near it (variety, likewise), 0 to 1."""
    fd_infinity: float | None = Field(None, exclude_if=unset)
    """``fd`` as it would be of endlessly many pictures (arXiv 1911.07023). None: too few to say, see ``moments``."""

    def of(self, figure: str) -> float:
        """The metric of that name, one of those that every set of images has."""
        return float(getattr(self, figure))

    def named(self) -> dict[str, float]:
        """The figures that there are, under names that say what they are, such as ``kid_efflite0``."""
        figures = {f"{name}_{self.extractor}": getattr(self, name) for name in FIGURES}
        counts = {"samples": self.samples, "reference": self.reference}
        return {name: value for name, value in figures.items() if value is not None} | counts


def judge(samples: Tensor, reference: Tensor | Reference, extractor: str) -> Scores:
    """Compare features (N, D) of judged pictures with those (M, D) of real ones; N and M at least 10.

    Where the same ``reference`` serves again, give it with what is known of it: most of the time goes there.
    """
    real = Reference.of(reference) if isinstance(reference, Tensor) else reference
    discrepancy = kid(samples, real.features, real.kernel_sums)
    shares = overlap(samples, real.features, nearest(samples), real.nearest)
    return Scores(
        extractor=extractor,
        samples=len(samples),
        reference=len(real.features),
        fd=distance(moments(samples), real.moments),
        kid=discrepancy.value,
        kid_se=discrepancy.error,
        precision=shares.precision,
        recall=shares.recall,
        density=shares.density,
        coverage=shares.coverage,
        fd_infinity=distance_at_infinity(samples, real.moments),
    )


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Of Gaussians fitted to features (N, D) and (M, D) (arXiv 1706.08500)."""
    return distance(moments(samples), moments(reference))
