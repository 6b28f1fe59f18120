"""MIWAE averaged over regroupings of the same draws."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.errors import check_range
from iwae_cli.core.noise import numpy_generator
from iwae_cli.objectives.base import Gradient
from iwae_cli.objectives.miwae import MIWAE

MAX_PLACES = 1_000_000
"""Permutations times draws: a step holds as many log-weights for every image."""


class UMIWAE(MIWAE):
    """The mean of MIWAE over several orders of the same m k draws (Burroni et al. 2023, arXiv 2302.13918).

    It is an incomplete U-statistic: the draws are grouped after each of some fixed permutations, the first of which
    leaves them as they are. Draws are exchangeable, so every order has the expectation of MIWAE, and their mean has at
    most its variance; that holds for the bound and for each gradient estimator. No network scores a draw twice: one
    more order costs m logarithms.

    Special cases: one permutation, m = 1 and k = 1 are MIWAE. Not to be confused with IWAE-(m k), which is tighter in
    expectation, or with ``piwae``, which trains p by that.

    With w~ the softmax inside each group: a = the mean over the orders of w~/m, b that of w~^2/m.
    """

    stratified = False  # in another order a group does not hold every component equally often

    def __init__(self, m: int, k: int, permutations: int = 10, gradient: Gradient = "total") -> None:
        super().__init__(m, k, gradient)
        check_range("permutations", permutations, 1)
        self.permutations = permutations
        n = self.num_samples
        if permutations * n > MAX_PLACES:
            raise ValueError(
                f"permutations={permutations:,} of m x k = {n:,} draws are {permutations * n:,} log-weights of an "
                f"image, more than {MAX_PLACES:,}"
            )
        generator = numpy_generator(0, "orders of draws")
        orders = np.stack([np.arange(n), *(generator.permutation(n) for _ in range(permutations - 1))])
        # Lists, since a compiled step takes no tensor from outside.
        self._order: list[int] = orders.ravel().tolist()
        places = orders.argsort(1) + n * np.arange(permutations)[:, None]
        self._places: list[int] = places.ravel().tolist()  # of every draw in the first order, in the second, ...

    def _groups(self, log_w: Float[Tensor, "mk batch"]) -> Float[Tensor, "k groups batch"]:
        order = torch.tensor(self._order, device=log_w.device)
        return log_w[order].unflatten(0, (-1, self.k)).transpose(0, 1)

    def _of_draws(self, values: Float[Tensor, "k groups batch"]) -> Float[Tensor, "mk batch"]:
        places = torch.tensor(self._places, device=values.device)
        of_orders = values.transpose(0, 1).flatten(0, 1)[places].unflatten(0, (self.permutations, -1))
        return of_orders.mean(0) / self.m
