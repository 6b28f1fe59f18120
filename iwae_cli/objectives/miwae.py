"""The mean of several importance weighted bounds."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.errors import check_range
from iwae_cli.core.numerics import log_mean_exp, normalized_weights
from iwae_cli.objectives.base import BoundObjective, Gradient


class MIWAE(BoundObjective):
    """1/m sum_j L_k^(j): the mean over m groups of k draws each (Rainforth et al. 2018, arXiv 1802.04537).

    The draws are grouped in their order: the first k make the first group. Special cases: m = 1 is IWAE-k, k = 1 the
    ELBO averaged over m draws. Not to be confused with IWAE-(m k), which has one logarithm over all draws, or with
    the MIWAE of Mattei and Frellsen 2019 (arXiv 1812.02633), which is about missing data.

    With w~ the softmax inside each group: a = w~/m, b = w~^2/m. ``stl`` is biased for k >= 2.
    """

    stratified = True

    def __init__(self, m: int, k: int, gradient: Gradient = "total") -> None:
        super().__init__(k, gradient)
        check_range("m", m, 1)
        self.m = m

    @property
    def num_samples(self) -> int:
        return self.m * self.k

    def bound(self, log_w: Float[Tensor, "mk batch"]) -> Float[Tensor, " batch"]:
        return log_mean_exp(self._groups(log_w)).mean(0)

    def weights(self, log_w: Float[Tensor, "mk batch"]) -> Float[Tensor, "mk batch"]:
        return self._of_draws(normalized_weights(self._groups(log_w)))

    def doubly_weights(self, log_w: Float[Tensor, "mk batch"]) -> Float[Tensor, "mk batch"]:
        return self._of_draws(normalized_weights(self._groups(log_w)).square())

    def _groups(self, log_w: Float[Tensor, "mk batch"]) -> Float[Tensor, "k m batch"]:
        return log_w.unflatten(0, (self.m, self.k)).transpose(0, 1)

    def _of_draws(self, values: Float[Tensor, "k m batch"]) -> Float[Tensor, "mk batch"]:
        """Return the values of the groups, each divided by m, in the order of the draws."""
        return values.transpose(0, 1).flatten(0, 1) / self.m
