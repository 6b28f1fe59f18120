"""Log-weights of the Gaussian models with binary pixels, faster than by ``model(x, k, noise)`` and equal to it.

What every model can do is in ``iwae_cli.models``, easy to read; this is the same sum for the models of most runs, on a
processor, in the form that costs least beside the matrix products that it cannot do without:

- One image at a time, its pixels put into the signs of the last weights: with s the logits and u = (2x - 1) s,
  log p(x|h) = sum_j log sigmoid(u_j) = sum over groups of log of a product of sigmoids, one logarithm a group.
- tanh(a) = 2 sigmoid(2a) - 1, the factors put into the weights on both sides: sigmoid is the cheaper function.
- log q(h|x) from the draws themselves; what depends on x alone is computed once for all samples.
- Few samples at once, in place, so that what one step writes is still in the cache when the next one reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.mlp import GaussianChain, GaussianRecognition
from iwae_cli.models.networks import GaussianConditional, TanhNetwork
from iwae_cli.noise import BLOCK, Noise

CHUNK = 16 * BLOCK
"""Samples computed at once: enough to hide the cost of a call, few enough to stay in the cache."""

GROUP = 16
"""Pixels whose probabilities are multiplied before a logarithm is taken; the product of more could underflow."""

CERTAIN = 100.0
"""Logit of a pixel that is not there: sigmoid(100) = 1 in every precision."""


@final
class FastScorer:
    """Computes the log-weights of one model, whose weights must not change meanwhile.

    Args:
        model: one that ``fits``.
        rows: bound on the samples computed at once.
    """

    def __init__(self, model: LatentVariableModel, rows: int = CHUNK) -> None:
        self._chunk = max(BLOCK, min(rows, CHUNK) // BLOCK * BLOCK)
        generative, inference = model.generative, model.inference
        assert isinstance(generative, GaussianChain) and isinstance(inference, GaussianRecognition)
        first, *upwards = inference.layers
        self._first = first
        self._white = generative.likelihood.white
        self._upwards = _conditionals(upwards)
        self._downwards = _conditionals(generative.layers)
        observation = generative.observation
        assert isinstance(observation, TanhNetwork)
        self._body = _Body(observation.body)
        self._weight, self._bias = self._body.then(observation.head)
        self._pixels = observation.head.out_features
        missing = -self._pixels % GROUP
        self._weight = F.pad(self._weight, (0, missing))
        self._bias = F.pad(self._bias, (0, missing), value=CERTAIN)

    @staticmethod
    def fits(model: LatentVariableModel) -> bool:
        """Whether these are the parts that are known here, and nothing derived from them."""
        generative, inference = model.generative, model.inference
        return (
            type(generative) is GaussianChain
            and type(inference) is GaussianRecognition
            and type(generative.likelihood) is Bernoulli
            and type(generative.observation) is TanhNetwork
            and all(type(layer) is GaussianConditional for layer in (*generative.layers, *inference.layers))
        )

    def log_weights(
        self,
        x: Float[Tensor, "batch pixels"],
        k: int,
        noise: Callable[[Sequence[int], int], Noise],
        images: Sequence[int],
        first: int = 0,
    ) -> Float[Tensor, "k batch"]:
        """log w of ``k`` draws for every x, nats.

        Args:
            x: binary pixels, in the dtype of the model.
            k: samples.
            noise: of some images from one sample on, a multiple of ``BLOCK``.
            images: what ``noise`` knows each x by.
            first: what it knows the first sample by.
        """
        log_w = x.new_empty(k, len(x))
        buffer = x.new_empty(min(k, self._chunk), self._bias.shape[0])
        loc, log_scale = self._first(x / self._white)
        sign = F.pad(2 * x - 1, (0, len(self._bias) - self._pixels), value=1)
        for b in range(len(x)):
            weight, bias = self._weight * sign[b], self._bias * sign[b]
            scale, sum_log_scale = log_scale[b].exp(), log_scale[b].sum()
            for start in range(0, k, self._chunk):
                n = min(self._chunk, k - start)
                draws = noise(images[b : b + 1], first + start)
                eps = draws.normal(1, n, 1, len(scale))[:, 0]
                latents = [torch.addcmul(loc[b], eps, scale)]
                # log q(h|x) + sum of d/2 log 2pi over the layers
                log_q = -0.5 * eps.square().sum(-1) - sum_log_scale
                for level, layer in enumerate(self._upwards, start=2):
                    above_loc, above_log_scale = layer(latents[-1])
                    eps = draws.normal(level, n, 1, above_loc.shape[-1])[:, 0]
                    latents.append(torch.addcmul(above_loc, eps, above_log_scale.exp()))
                    log_q -= (0.5 * eps.square() + above_log_scale).sum(-1)
                # log p(h) + the same
                log_p = -0.5 * latents[-1].square().sum(-1)
                for layer, below, above in zip(self._downwards, latents, latents[1:], strict=False):
                    below_loc, below_log_scale = layer(above)
                    standardized = (below - below_loc) * torch.exp(-below_log_scale)
                    log_p -= (0.5 * standardized.square() + below_log_scale).sum(-1)
                log_p += self._log_likelihood(self._body(latents[0]), weight, bias, buffer[:n])
                torch.sub(log_p, log_q, out=log_w[start : start + n, b])
        return log_w

    def _log_likelihood(self, features: Tensor, weight: Tensor, bias: Tensor, buffer: Tensor) -> Tensor:
        """log p(x|h) of every row of ``features``, with weights that carry the signs of x."""
        probabilities = torch.addmm(bias, features, weight, out=buffer).sigmoid_()
        log_p = probabilities.view(len(buffer), GROUP, -1).prod(1).log_().sum(-1)
        # A product that has left the range of the numbers: those samples again, term by term.
        lost = ~log_p.isfinite()
        if lost.any():
            log_p[lost] = F.logsigmoid(torch.addmm(bias, features[lost], weight)).sum(-1)
        return log_p


class _Body:
    """A tanh network as products and sigmoids; its values are those sigmoids, (tanh + 1) / 2."""

    def __init__(self, body: nn.Sequential) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        for linear in body:
            if isinstance(linear, nn.Linear):
                weight, bias = self.then(linear)
                self._layers.append((2 * weight, 2 * bias))

    def then(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight, transposed, and bias that give of the sigmoids what ``linear`` gives of the tanh."""
        weight, bias = linear.weight.detach().t(), linear.bias.detach()
        if not self._layers:
            return weight.contiguous(), bias
        return 2 * weight.contiguous(), bias - weight.double().sum(0).to(bias.dtype)

    def __call__(self, given: Tensor) -> Tensor:
        for weight, bias in self._layers:
            given = torch.addmm(bias, given, weight).sigmoid_()
        return given


class _Conditional:
    """A Gaussian conditional with both of its heads in one product."""

    def __init__(self, conditional: GaussianConditional) -> None:
        self._body = _Body(conditional.body)
        heads = [self._body.then(head) for head in (conditional.loc, conditional.log_scale)]
        self._weight = torch.cat([weight for weight, _ in heads], dim=1)
        self._bias = torch.cat([bias for _, bias in heads])

    def __call__(self, given: Tensor) -> tuple[Tensor, ...]:
        return torch.addmm(self._bias, self._body(given), self._weight).chunk(2, dim=-1)


def _conditionals(layers: Iterable[nn.Module]) -> list[_Conditional]:
    return [_Conditional(layer) for layer in layers if isinstance(layer, GaussianConditional)]
