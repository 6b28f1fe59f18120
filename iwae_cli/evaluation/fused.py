"""Log-weights of Gaussian models with binary pixels, faster than ``model(x, k, noise)`` and equal to it up to rounding.

The same sum as in ``iwae_cli.models``, for the models of most runs on a CPU, with as little as possible beside the
matrix products:

- One image at a time, its pixels as signs of the last weights: with s the logits and u = (2x - 1) s,
  log p(x|h) = sum_j log sigmoid(u_j), computed as one logarithm of a product of sigmoids for a group of pixels.
- tanh(a) = 2 sigmoid(2a) - 1, the factors folded into the weights on both sides: sigmoid is the cheaper function.
- log q(h|x) from the draws themselves; what depends on x alone is computed once for all samples.
- Optionally products of bfloat16 numbers with float32 sums, twice as fast where the CPU has them: of the weights and
  the tanh values, but not of the latents, nor in p(h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.device import Device, has_bf16
from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import BLOCK, Noise
from iwae_cli.evaluation.proposals import Refined, from_q, mixture_log_prob
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import GaussianConditional
from iwae_cli.models.likelihoods import Bernoulli, MLPPixels
from iwae_cli.models.priors import StandardNormal

CHUNK = 40 * BLOCK  # largest number of samples computed in one call: enough to hide the cost of the calls
FIRST_GROUPS, SECOND_GROUPS = 8, 2  # pixels whose probabilities are multiplied, in two steps, before the logarithm
CERTAIN = 100.0  # logit of a padded pixel: sigmoid(100) = 1 in every precision


def check_bf16(evaluation: Evaluation, model: Architecture, device: Device) -> None:
    """Raise UserError if ``evaluation.precision=bf16`` is not possible with this model and device."""
    if evaluation.precision == "float32":
        return
    wrong = {
        "Gaussian models of binary pixels, as model=one_layer or two_layer": (
            type(model) is not GaussianMLP
            or model.likelihood != "bernoulli"
            or model.prior != "standard"
            or model.posterior != "diagonal"
        ),
        "model.activation=tanh": getattr(model, "activation", "tanh") != "tanh",
        "device=cpu": device.resolve().type != "cpu",
        "device.precision=float32": device.precision != "float32",
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"evaluation.precision=bf16 is for {what}; write evaluation.precision=float32")
    if not has_bf16():
        lacks = "needs a processor with instructions for bfloat16, which this one lacks"
        raise UserError(f"evaluation.precision=bf16 {lacks}; write evaluation.precision=float32")


@final
class FusedScorer:
    """Computes the log-weights of one model that ``fits``, whose weights must not change meanwhile.

    It takes at most ``rows`` samples together; ``bf16`` is for a model in float32.
    """

    def __init__(self, model: LatentVariableModel, rows: int = CHUNK, bf16: bool = False) -> None:
        self._blocks = max(1, min(rows, CHUNK) // BLOCK)
        generative, inference = model.generative, model.inference
        self._first, *upwards = inference.layers
        self._white = inference.white
        # A rounded q is a q as good as any, drawn from and scored; p must stay exact, and its Gaussians may be narrow.
        self._upwards = [_conditional(layer, bf16) for layer in upwards]
        self._downwards = [_conditional(layer, bf16=False) for layer in generative.layers]
        observation = generative.observation
        assert isinstance(observation, MLPPixels)
        self._body = _Body(observation.body, bf16)
        self._pixels = observation.head.out_features
        self._padding = -self._pixels % (FIRST_GROUPS * SECOND_GROUPS)
        self._head = self._body.then([observation.head], self._padding)

    @staticmethod
    def fits(model: LatentVariableModel, x: Shaped[Tensor, "n pixels"]) -> bool:
        """Return whether the model consists of exactly the known classes and every pixel is 0 or 1."""
        generative, inference = model.generative, model.inference
        observation: Any = generative.observation
        layers: list[Any] = [*generative.layers, *inference.layers]
        return bool(
            type(generative) is GenerativeChain
            and type(inference) is InferenceChain
            and type(generative.prior) is StandardNormal
            and type(observation) is MLPPixels
            and type(observation.likelihood) is Bernoulli
            and all(type(layer) is GaussianConditional for layer in layers)
            and all(isinstance(part, nn.Linear | nn.Tanh) for layer in (observation, *layers) for part in layer.body)
            and ((x == 0) | (x == 1)).all()
        )

    def log_weights(
        self,
        x: Float[Tensor, "batch pixels"],
        k: int,
        noise: Callable[[Sequence[int], int], Noise],
        images: Sequence[int],
        first: int = 0,
        refined: Refined | None = None,
    ) -> Float[Tensor, "k batch"]:
        """Return log w of ``k`` draws for every binary x, nats; of q, or of ``refined``, fitted to these images.

        ``noise`` returns the noise of some of the ``images`` from a sample on; ``first`` is a multiple of BLOCK.
        """
        log_w = x.new_empty(k, len(x))
        blocks = -(-k // BLOCK)
        # As few chunks as possible, of equal size.
        chunk = -(-blocks // -(-blocks // self._blocks)) * BLOCK
        buffer = x.new_empty(min(k, chunk), self._pixels + self._padding)
        loc, log_scale = self._first(x / self._white)  # (batch, d_1) each
        sign = F.pad(2 * x - 1, (0, self._padding), value=1)  # (batch, padded)
        for b in range(len(x)):
            head = self._head.times(sign[b])
            q = (loc[b], log_scale[b])
            draw = _by_q(*q) if refined is None else _by_mixture(q, refined.loc[b], refined.cholesky[b])
            for start in range(0, k, chunk):
                n = min(chunk, k - start)
                draws = noise(images[b : b + 1], first + start)
                # 2 log q(h|x) and 2 log p(h), (n,), both without d log 2 pi.
                h, log_q = draw(draws, n)
                latents = [h]  # (n, d_l) each
                for level, layer in enumerate(self._upwards, start=2):
                    above_loc, above_log_scale = layer(latents[-1])  # (n, d_level) each
                    eps = draws.normal(level, n, 1, above_loc.shape[-1])[:, 0]
                    latents.append(torch.addcmul(above_loc, eps, above_log_scale.exp()))
                    log_q -= torch.linalg.vecdot(eps, eps) + 2 * above_log_scale.sum(-1)
                log_p = -torch.linalg.vecdot(latents[-1], latents[-1])
                for layer, below, above in zip(self._downwards, latents, latents[1:], strict=False):
                    below_loc, below_log_scale = layer(above)  # as below
                    standardized = (below - below_loc) * torch.exp(-below_log_scale)
                    log_p -= torch.linalg.vecdot(standardized, standardized) + 2 * below_log_scale.sum(-1)
                likelihood = _log_likelihood(self._body(latents[0]), head, buffer[:n])
                torch.add(likelihood, log_p - log_q, alpha=0.5, out=log_w[start : start + n, b])
        return log_w


Draw = Callable[[Noise, int], tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]]
"""Returns n draws h_1 of one image, with twice their log-density without d log 2 pi."""


def _by_q(loc: Float[Tensor, " d"], log_scale: Float[Tensor, " d"]) -> Draw:
    scale, log_det = log_scale.exp(), log_scale.sum()

    def draw(noise: Noise, n: int) -> tuple[Tensor, Tensor]:
        eps = noise.normal(1, n, 1, len(loc))[:, 0]
        return torch.addcmul(loc, eps, scale), _twice_log_density(eps, log_det)

    return draw


def _by_mixture(
    q: tuple[Float[Tensor, " d"], Float[Tensor, " d"]], loc: Float[Tensor, " d"], cholesky: Float[Tensor, "d d"]
) -> Draw:
    """As ``_by_q``, whose arguments are ``q``, by the mixture of ``Refined``."""
    q_loc, q_scale, q_log_det = q[0], q[1].exp(), q[1].sum()
    log_det = cholesky.diagonal().log().sum()
    inverse = torch.linalg.solve_triangular(cholesky, torch.eye(len(loc)).to(cholesky), upper=False)

    def draw(noise: Noise, n: int) -> tuple[Tensor, Tensor]:
        eps = noise.normal(1, n, 1, len(loc))[:, 0]
        fitted = torch.addmm(loc, eps, cholesky.T)
        h = torch.where(from_q(noise, n, 1)[:, 0], torch.addcmul(q_loc, eps, q_scale), fitted)
        log_fitted = _twice_log_density((h - loc) @ inverse.T, log_det)
        log_q = _twice_log_density((h - q_loc) / q_scale, q_log_det)
        return h, 2 * mixture_log_prob(log_fitted / 2, log_q / 2)

    return draw


def _twice_log_density(standardized: Float[Tensor, "n d"], log_det: Float[Tensor, ""]) -> Float[Tensor, " n"]:
    return -2 * log_det - torch.linalg.vecdot(standardized, standardized)


def _log_likelihood(
    features: Float[Tensor, "n hidden"], head: _Linear, buffer: Float[Tensor, "n padded"]
) -> Float[Tensor, " n"]:
    """Return log p(x|h) of every row, nats; ``head`` carries the signs of x, ``buffer`` is overwritten."""
    probabilities = head(features, out=buffer).sigmoid_()  # (n, padded)
    products = probabilities.view(len(buffer), FIRST_GROUPS, -1).prod(1)  # (n, padded / 8)
    log_p = products.view(len(buffer), SECOND_GROUPS, -1).prod(1).log_().sum(-1)
    if not math.isfinite(log_p.amin()):
        # A product has left the range of the numbers: compute those samples again, term by term.
        lost = ~log_p.isfinite()  # (n,)
        log_p[lost] = F.logsigmoid(head(features[lost])).sum(-1)
    return log_p


class _Linear:
    """given @ weight + bias; with a weight of bfloat16, (given - 1/2) @ weight + bias.

    A sigmoid in bfloat16 is as coarse near 1 as near 1/2; less 1/2, tanh keeps its eight bits at any size.
    """

    def __init__(self, weight: Shaped[Tensor, "i o"], bias: Float[Tensor, " o"]) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, given: Float[Tensor, "n i"], out: Float[Tensor, "n o"] | None = None) -> Float[Tensor, "n o"]:
        if given.dtype == self._weight.dtype:
            return torch.addmm(self._bias, given, self._weight, out=out)
        product = torch.mm((given - 0.5).to(self._weight.dtype), self._weight)
        return (product.to(given.dtype) if out is None else out.copy_(product)).add_(self._bias)

    def times(self, sign: Float[Tensor, " o"]) -> _Linear:
        """Return the layer with every output multiplied by its sign."""
        return _Linear(self._weight * sign.to(self._weight.dtype), self._bias * sign)


class _Body:
    """A tanh network as products and sigmoids; its outputs are the sigmoids, (tanh + 1) / 2."""

    def __init__(self, body: nn.Sequential, bf16: bool) -> None:
        self._layers: list[_Linear] = []
        self._bf16 = bf16
        for linear in body:
            if isinstance(linear, nn.Linear):
                self._layers.append(self.then([linear], factor=2))

    def then(self, heads: Sequence[nn.Linear], padding: int = 0, factor: int = 1) -> _Linear:
        """Fold tanh(a) = 2 sigmoid(2a) - 1 into the concatenated weights of ``heads``, scaled by ``factor``.

        ``padding`` outputs that are always ``CERTAIN`` are added; ``factor`` is 2 where a sigmoid follows.
        """
        weight = torch.cat([head.weight.detach() for head in heads]).t().contiguous() * factor  # (i, o)
        bias = torch.cat([head.bias.detach() for head in heads]) * factor  # (o,)
        if self._layers:
            weight = 2 * weight
            # The latents stay in float32: they have no bounds, and their errors would reach everything that follows.
            if self._bf16:
                weight = weight.bfloat16()
            else:
                bias = bias - (weight.double().sum(0) / 2).to(bias.dtype)
        return _Linear(F.pad(weight, (0, padding)), F.pad(bias, (0, padding), value=CERTAIN))

    def __call__(self, given: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        for layer in self._layers:
            given = layer(given).sigmoid_()
        return given


def _conditional(layer: Any, bf16: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a ``GaussianConditional`` as a function, (n, i) -> (n, o) twice, with both of its heads in one product."""
    body = _Body(layer.body, bf16)
    heads = body.then([layer.loc, layer.log_scale])
    return lambda given: heads(body(given)).chunk(2, dim=-1)
