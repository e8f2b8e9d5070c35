"""Errors of distances and shares, of one set of pictures and of the difference of two.

Both sets are cut at random into halves A and B, and the figure T is computed of either: of half of the samples against
half of the reference. A and B have no picture in common and are independent, so

    E[(T(A) − T(B))² / 4] = V(half) / 2,

where V is the variance of the figure over new draws of both sets. That is exact, whatever the figure. And V(half) / 2
is V(all) where V falls as 1/n, as that of nearly every figure does in the end; where it falls faster (KID and the
Fréchet distance of sets that cannot be told apart: as 1/n²) the error comes out too large, by √2, never too small. Of
many such cuts the mean is taken. It is the bootstrap with weights 0 and 2 (Præstgaard and Wellner, Ann. Prob. 21,
1993). Shares near 1 may be nearer still on halves, with too small an error, for which ``Share`` has wider intervals.

Why not resample with replacement: a picture drawn twice is its own nearest neighbour at distance 0, and similar to
itself; that shrinks neighbourhoods and moves KID. Halves hold nothing twice, keep the proportion of both sets, on which
coverage depends, and each costs a half. The mean of T over halves tells the bias, too: see ``Replicates.value``.

What the intervals are about: other pictures drawn from the same weights, and other held-out pictures of the same kind.
So the reference is resampled: held fixed, a model that happens to suit these very pictures would surely be better.
In a comparison both models have the same picture numbers and the same reference in each half, and what they have in
common cancels. Nothing is said of other trainings of the same configuration.
"""

from diffusion.evaluation.bootstrap.frechet import frechet
from diffusion.evaluation.bootstrap.halves import SPLITS, Figure, Replicates, difference
from diffusion.evaluation.bootstrap.kid import kid
from diffusion.evaluation.bootstrap.neighbourhoods import neighbourhoods
from diffusion.evaluation.bootstrap.replicates import replicates

__all__ = ["SPLITS", "Figure", "Replicates", "difference", "frechet", "kid", "neighbourhoods", "replicates"]
