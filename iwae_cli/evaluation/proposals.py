"""Proposals for the estimate of log p(x): what draws h for an image.

The trained q is the first proposal. A refined one replaces q(h_1|x) by a Gaussian with full covariance, fitted to each
image by its ELBO, the local step of Cremer, Li, Duvenaud 2018 (arXiv 1801.03558), and keeps q(h_2|h_1), q(h_3|h_2),
... Its fit takes noise of its own, so that E[L_k] <= log p(x) holds as for any fixed proposal (Burda, Grosse,
Salakhutdinov 2016, arXiv 1509.00519). It is mixed with q(h_1|x), so that no weight exceeds its value under q alone
divided by ``SHARE``, however bad a fit is. docs/numbers.md has the search behind the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import GeneratorNoise, Noise, generator
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import InferenceChain
from iwae_cli.models.networks import full_normal_log_prob

GROUP = 20  # images fitted together, by their index: a product's shape may change its last bits, which steps amplify
SHARE = 0.1  # of q(h_1|x) in the mixture
WIDEN = 1.1  # factor on the fitted scale: a proposal wider than its target has weights of smaller variance
STEPS, BETAS = 200, (0.9, 0.99)  # of Adam
DRAWS = 8  # for each image and step
RATE_LOC = 0.1  # of the mean, in units of the widest of ``STARTS``
RATE_SCALE = 0.1  # of the logarithm of the scale, at most; less with more than ten latents
MOMENT_DRAWS = 256  # for the moments of q and p
STARTS = ((1, 0.2), (1, 0.05), (1, 0.0125), (1, 0.0), (1 / 4, 0.0), (1 / 16, 0.0))
"""Scales that a fit may begin with: a share of the scale of q, but at least a share of the spread of h_1 under p."""
START_DRAWS = 16  # for the ELBO of each
DISCRETE = "a Gaussian is fitted to real latents, and those of this model are discrete"


@dataclass(frozen=True)
class Fitted:
    """A Gaussian for h_1 of every image, with q(h_2|h_1), q(h_3|h_2), ... above it."""

    inference: InferenceChain  # the trained q
    loc: Float[Tensor, "batch d"]  # means of h_1
    cholesky: Float[Tensor, "batch d d"]  # factors of its covariances, lower triangular with a positive diagonal

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Return ``k`` draws h for every x, as q does, and their log-density in nats."""
        h = self.draw(k, noise)
        above, log_q = _above(self.inference, h, noise)
        return (h, *above), self.gaussian_log_prob(h) + log_q

    def draw(self, k: int, noise: Noise) -> Float[Tensor, "k batch d"]:
        """Return ``k`` draws of h_1 for every image."""
        return self.loc + torch.einsum("bij,kbj->kbi", self.cholesky, noise.normal(1, k, *self.loc.shape))

    def gaussian_log_prob(self, h: Float[Tensor, "k batch d"]) -> Float[Tensor, "k batch"]:
        """Return the log-density of the Gaussian alone, nats."""
        return full_normal_log_prob(h, self.loc, self.cholesky)


class Refined(Fitted):
    """The Gaussian of every image mixed with q(h_1|x)."""

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Return ``k`` draws h for every x, and the log-density of the mixture in nats."""
        batch, first, given = len(x), self.inference.layers[0], x / self.inference.white
        of_q, _ = first.sample(given, k, batch, 1, noise)
        h = torch.where(from_q(noise, k, batch), of_q, self.draw(k, noise))
        log_r = mixture_log_prob(self.gaussian_log_prob(h), first.log_prob(h, given))
        above, log_q = _above(self.inference, h, noise)
        return (h, *above), log_r + log_q


def refine(
    model: LatentVariableModel,
    x: Float[Tensor, "n pixels"],
    images: Sequence[int],
    seed: int,
    stream: str,
    check: Callable[[], None] = lambda: None,
) -> Refined:
    """Return the mixture of every image: q and the Gaussian of ``fit``, whose arguments these are, widened."""
    fitted = fit(model, x, images, seed, stream, check)
    return Refined(fitted.inference, fitted.loc, WIDEN * fitted.cholesky)


def fit(
    model: LatentVariableModel,
    x: Float[Tensor, "n pixels"],
    images: Sequence[int],
    seed: int,
    stream: str,
    check: Callable[[], None] = lambda: None,
    diagonal: bool = False,
) -> Fitted:
    """Return the Gaussian of every image with the best ELBO, fitted to it alone; ``diagonal``: without covariances.

    Args:
        model: with ``why_not`` None; its dtype and device are those of x.
        images: indices of x within their split, consecutive, from a multiple of ``GROUP`` on.
        seed, stream: of the noise of the fit; the stream must not be that of the evaluation.
        check: called often; may raise to stop.
    """
    if images[0] % GROUP:
        raise ValueError(f"images must begin at a multiple of {GROUP}, got {images[0]}")
    fits = []
    # Also where the caller has switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        for start in range(0, len(x), GROUP):
            group = x[start : start + GROUP].clone()
            padded = torch.cat([group, group[-1:].expand(GROUP - len(group), -1)])
            noise = GeneratorNoise(generator(x.device, seed, stream, "fit", images[start]), x.dtype)
            loc, cholesky = _maximize_elbo(model, padded, noise, check, diagonal)
            fits.append((loc[: len(group)], cholesky[: len(group)]))
    return Fitted(model.inference, torch.cat([loc for loc, _ in fits]), torch.cat([scale for _, scale in fits]))


def why_not(model: LatentVariableModel) -> str | None:
    """Return why there is no refined proposal for a model; None if there is."""
    return None if model.inference.reparameterized else DISCRETE


def from_q(noise: Noise, k: int, batch: int) -> Bool[Tensor, "k batch 1"]:
    """Return which draws of the mixture are those of q."""
    # Of layer 0, which is x and is not drawn here: the draws of h_1 do not depend on it.
    return noise.uniform(0, k, batch, 1) < SHARE


def mixture_log_prob(fitted: Float[Tensor, "*n"], of_q: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return the log-density of the mixture of two parts with these log-densities, nats."""
    return torch.logaddexp(math.log1p(-SHARE) + fitted, math.log(SHARE) + of_q)


def _above(
    inference: InferenceChain, h: Float[Tensor, "k batch d"], noise: Noise
) -> tuple[Latents, Float[Tensor, "k batch"]]:
    """Return draws of the layers above h_1, and their log-density in nats."""
    latents: list[Tensor] = []
    k, batch, _ = h.shape
    log_q = h.new_zeros(k, batch)
    for level, layer in enumerate(list(inference.layers)[1:], start=2):
        h, of_layer = layer.sample(h, k, batch, level, noise)
        latents.append(h)
        log_q = log_q + of_layer
    return tuple(latents), log_q


def _maximize_elbo(
    model: LatentVariableModel, x: Float[Tensor, "n pixels"], noise: Noise, check: Callable[[], None], diagonal: bool
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d d"]]:
    """Return means and Cholesky factors of the best Gaussian for h_1 of every image.

    Adam follows the path derivative (Roeder, Wu, Duvenaud 2017, arXiv 1703.09194), whose noise vanishes where the
    Gaussian is the posterior: the effective sample size is several times that by the whole derivative.
    """
    loc, widest, scale = _start(model, x, noise)
    n, size = loc.shape
    # In units of these: h = loc + widest shift + scale triangle eps.
    shift, log_diagonal = (torch.zeros_like(loc).requires_grad_() for _ in range(2))
    below = loc.new_zeros(n, size, size).requires_grad_()
    trained = [shift, log_diagonal] if diagonal else [shift, log_diagonal, below]
    # More latents, more noise in every entry of the triangle.
    rate = min(RATE_SCALE, 1 / size)
    rates = (RATE_LOC, rate, rate)
    groups = [{"params": [part], "lr": rate} for part, rate in zip(trained, rates, strict=False)]
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        check()
        half = noise.normal(1, DRAWS // 2, n, size)
        triangle = below.tril(-1) + torch.diag_embed(log_diagonal.exp())
        mean, cholesky = loc + widest * shift, scale[..., None] * triangle
        h = mean + torch.einsum("bij,kbj->kbi", cholesky, torch.cat([half, -half]))
        above, log_q = _above(model.inference, h, noise)
        log_r = full_normal_log_prob(h, mean.detach(), cholesky.detach())
        log_w = model.generative(x, (h, *above)) - log_q - log_r
        gradients = torch.autograd.grad(-log_w.mean(0).sum(), trained)
        for part, gradient in zip(trained, gradients, strict=True):
            part.grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        triangle = below.tril(-1) + torch.diag_embed(log_diagonal.exp())
        fitted = loc + widest * shift, scale[..., None] * triangle
        # Where a fit has diverged, the widened moments of q are a proposal as valid.
        diverged = ~torch.stack([part.flatten(1).isfinite().all(1) for part in fitted]).all(0)  # (n,)
        return (
            torch.where(diverged[:, None], loc, fitted[0]),
            torch.where(diverged[:, None, None], torch.diag_embed(widest), fitted[1]),
        )


@torch.no_grad()
def _start(
    model: LatentVariableModel, x: Float[Tensor, "n pixels"], noise: Noise
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Return the mean of q(h_1|x), and of the scales ``STARTS`` the widest and that with the best ELBO, for each image.

    A fit changes a scale by a limited factor, and q may be far too sure or far too wide. The mean may have far to go
    where the best scale is small, since the posterior is narrow: its steps have the size of the widest.
    """
    inference, n = model.inference, len(x)
    # From draws, since a ``Conditional`` need not know its own moments.
    drawn, _ = inference.layers[0].sample(x / inference.white, MOMENT_DRAWS, n, 1, noise)
    of_p, _ = model.generative.sample(MOMENT_DRAWS, noise)
    loc, of_q, spread = drawn.mean(0), drawn.std(0), of_p[0][0].std(0)
    scales = torch.stack([torch.maximum(share * of_q, least * spread) for share, least in STARTS])
    half = noise.normal(1, START_DRAWS // 2, *loc.shape)
    elbos = []
    for scale in scales:
        h = loc + scale * torch.cat([half, -half])
        above, log_q = _above(inference, h, noise)
        elbos.append((model.generative(x, (h, *above)) - log_q).mean(0) + scale.log().sum(-1))
    best = torch.stack(elbos).nan_to_num(nan=-math.inf, posinf=-math.inf).argmax(0)
    return loc, scales[0], scales[best, torch.arange(n, device=best.device)]
