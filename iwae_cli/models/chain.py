"""The two networks of a model, each a chain of conditionals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar, cast

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise, default_noise
from iwae_cli.models.conditionals import Conditional
from iwae_cli.models.exact import exact_log_px

T = TypeVar("T")

Images = Float[Tensor, "batch pixels"]

MEAN_DRAWS = 500
"""Draws for a mean that has no closed form."""


class GenerativeChain(nn.Module):
    """p(x, h) = p(x|h_1) p(h_1|h_2) ... p(h_L) with parameters theta, each factor a ``Conditional``.

    Args:
        prior: p(h_L).
        observation: p(x|h_1).
        layers: p(h_l|h_(l+1)), nearest to x first.
    """

    def __init__(self, prior: Conditional, observation: Conditional, layers: Sequence[Conditional]) -> None:
        super().__init__()
        # In this order initial weights are drawn, and the optimizer's state is stored.
        self.prior = prior
        self.observation = observation
        self.layers = cast(Sequence[Conditional], nn.ModuleList(layers))

    def log_likelihood(self, x: Images, latents: Latents) -> Float[Tensor, "k batch"]:
        """Return log p(x|h_1), nats."""
        return self.observation.log_prob(x, latents[0])

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]:
        """Return log p(h_L) + log p(h_1|h_2) + ..., nats."""
        log_p = self.prior.log_prob(latents[-1], None)
        for layer, (below, above) in zip(self.layers, pairwise(latents), strict=True):
            log_p = log_p + layer.log_prob(below, above)
        return log_p

    def forward(self, x: Images, latents: Latents) -> Float[Tensor, "k batch"]:
        """Return log p(x, h), nats."""
        return self.log_likelihood(x, latents) + self.log_prior(latents)

    def sample(self, n: int, noise: Noise | None = None) -> tuple[Latents, Float[Tensor, "n pixels"]]:
        """Return ``n`` draws (h, x) ~ p(x, h) from the top layer down; the latents have shape (1, n, d_l).

        ``noise`` is ``default_noise``, the same for equal calls, unless given.
        """
        noise = default_noise(next(self.parameters())) if noise is None else noise
        factors = [self.observation, *self.layers, self.prior]
        values: list[Tensor] = []
        for level in reversed(range(len(factors))):
            drawn, _ = factors[level].sample(values[0] if values else None, 1, n, level, noise)
            values.insert(0, drawn)
        return tuple(values[1:]), values[0][0]

    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """Return E[x|h_1], in the units of x."""
        mean = self.observation.mean(latents[0])
        assert mean is not None  # p(x|h_1) is no flow
        return mean

    def require_observable(self, x: Shaped[Tensor, "batch pixels"]) -> None:
        """Raise ValueError where x holds values that p(x|h_1) has not: its log-density there is no log-density."""
        largest = self.observation.largest
        possible = x.isfinite() if largest is None else (x >= 0) & (x <= largest) & (x % 1 == 0)
        if not possible.all():
            wanted = "finite" if largest is None else "0 or 1" if largest == 1 else f"an integer from 0 to {largest}"
            name = type(getattr(self.observation, "likelihood", self.observation)).__name__
            low, high = (float(value) for value in x.aminmax())
            raise ValueError(f"x must be {wanted} for {name}, got values from {low:g} to {high:g}")

    def exact_log_px(self, x: Images) -> Float[Tensor, " batch"] | None:
        """Return log p(x) in float64, nats, for linear-Gaussian chains and for few discrete states; else None.

        Raises:
            ValueError: as ``require_observable``.
        """
        self.require_observable(x)
        return exact_log_px(x, self.prior, self.observation, list(self.layers))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Load also from version 0.2.0, where p(x|h_1) of linear models was the first of ``layers``."""
        if not any(name.startswith(f"{prefix}observation.") for name in state_dict):
            for name in [name for name in state_dict if name.startswith(f"{prefix}layers.")]:
                number, _, parameter = name.removeprefix(f"{prefix}layers.").partition(".")
                layer = "observation" if number == "0" else f"layers.{int(number) - 1}"
                state_dict[f"{prefix}{layer}.{parameter}"] = state_dict.pop(name)
        if f"{prefix}prior_logits" in state_dict:
            state_dict[f"{prefix}prior.logits"] = state_dict.pop(f"{prefix}prior_logits")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _OfLayers(Generic[T]):
    """An attribute that follows from the layers of the moment, unless a chain is given another value."""

    def __init__(self, of: Callable[[Sequence[Conditional]], T]) -> None:
        self._of = of

    def __get__(self, chain: nn.Module, owner: type | None = None) -> T:
        return self._of(getattr(chain, "layers", ()))


class InferenceChain(nn.Module):
    """q(h|x) = q(h_1|x) q(h_2|h_1) ... with parameters phi, each factor a ``Conditional``.

    Args:
        layers: the factors, nearest to x first.
        white: largest value of a pixel; the first factor is given x / white.
    """

    reparameterized = _OfLayers(lambda layers: all(layer.reparameterized for layer in layers))
    """Whether draws are smooth functions of phi; if not, their gradient is the score of q."""
    strata = _OfLayers(lambda layers: math.prod(layer.strata for layer in layers))
    """Draws in training are taken in turn from so many parts of q; 1 if they are independent."""

    def __init__(self, layers: Sequence[Conditional], white: float = 1.0) -> None:
        super().__init__()
        self.layers = cast(Sequence[Conditional], nn.ModuleList(layers))
        self.white = white

    def sample(self, x: Images, k: int, noise: Noise | None = None) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Return ``k`` draws h ~ q(h|x) for every x from the bottom layer up, and log q(h|x) in nats.

        ``noise`` is ``default_noise``, the same for equal calls, unless given.
        """
        noise = default_noise(x) if noise is None else noise
        latents: list[Tensor] = []
        log_q, given = x.new_zeros(()), x / self.white
        for level, layer in enumerate(self.layers, start=1):
            given, log_prob = layer.sample(given, k, x.shape[0], level, noise)
            log_q = log_q + log_prob
            latents.append(given)
        return tuple(latents), log_q

    def forward(self, x: Images, latents: Latents) -> Float[Tensor, "k batch"]:
        """Return log q(h_1|x) + log q(h_2|h_1) + ..., nats."""
        log_q = x.new_zeros(())
        for layer, given, h in zip(self.layers, (x / self.white, *latents), latents, strict=False):
            log_q = log_q + layer.log_prob(h, given)
        return log_q

    def posterior_means(self, x: Images, draws: int, noise: Noise) -> tuple[Float[Tensor, "batch _"], ...]:
        """Return E_q[h_l|x] of every layer, of discrete ones probabilities.

        Exact for the first layer and where means are linear; else averaged over ``draws`` of the layer below. A mean
        that has no closed form is that of ``MEAN_DRAWS`` draws.
        """
        batch, given = x.shape[0], x / self.white
        means = [self._mean(1, given, batch, noise)]
        for level, (below, layer) in enumerate(pairwise(self.layers), start=1):
            given, _ = below.sample(given, draws, batch, level, noise)
            linear = layer.mean(means[-1]) if layer.linear_mean else None
            means.append(self._mean(level + 1, given, batch, noise) if linear is None else linear)
        return tuple(means)

    def _mean(self, level: int, given: Tensor, batch: int, noise: Noise) -> Float[Tensor, "batch _"]:
        """Return E[h_level|given], averaged over the draws of ``given`` where there are several."""
        layer = self.layers[level - 1]
        mean = layer.mean(given)
        if mean is None:
            many = given if given.dim() == 2 else given.repeat(-(-MEAN_DRAWS // len(given)), 1, 1)
            mean, _ = layer.sample(many, MEAN_DRAWS if many.dim() == 2 else len(many), batch, level, noise)
        return mean if mean.dim() == 2 else mean.mean(0)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Load also from version 0.2.0, where the only layer of model=categorical was called ``logits``."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}logits.")]:
            state_dict[f"{prefix}layers.0.{name.removeprefix(f'{prefix}logits.')}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)
