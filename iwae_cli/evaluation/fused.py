"""Log-weights of the Gaussian models with binary pixels, faster than by ``model(x, k, noise)`` and equal to it.

What every model can do is in ``iwae_cli.models``, easy to read; this is the same sum for the models of most runs, on a
processor, in the form that costs least beside the matrix products that it cannot do without:

- One image at a time, its pixels put into the signs of the last weights: with s the logits and u = (2x - 1) s,
  log p(x|h) = sum_j log sigmoid(u_j) = sum over groups of log of a product of sigmoids, one logarithm a group.
- tanh(a) = 2 sigmoid(2a) - 1, the factors put into the weights on both sides: sigmoid is the cheaper function.
- log q(h|x) from the draws themselves; what depends on x alone is computed once for all samples.
- By choice, products of bfloat16 numbers with float32 sums, twice as fast where the processor has them: of the
  weights and of what tanh gives, but not of the latents, nor in p(h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.device import Device
from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import BLOCK, Noise
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.architectures.mlp import GaussianChain, GaussianMLP, GaussianRecognition
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.networks import GaussianConditional, TanhNetwork

CHUNK = 40 * BLOCK
"""Samples computed at once, at most: enough to hide the cost of the calls."""

FIRST_GROUPS, SECOND_GROUPS = 8, 2
"""Pixels whose probabilities are multiplied, in two steps, before a logarithm is taken of their product."""

CERTAIN = 100.0
"""Logit of a pixel that is not there: sigmoid(100) = 1 in every precision."""


def check_bf16(evaluation: Evaluation, model: Architecture, device: Device) -> None:
    """Refuse ``evaluation.precision=bf16`` where it cannot be had.

    Raises:
        UserError: another model, device or precision.
    """
    if evaluation.precision == "float32":
        return
    wrong = None
    if type(model) is not GaussianMLP or model.likelihood != "bernoulli":
        wrong = "Gaussian models of binary pixels, as model=one_layer or two_layer"
    elif device.resolve().type != "cpu":
        wrong = "device=cpu"
    elif device.precision != "float32":
        wrong = "device.precision=float32"
    if wrong is not None:
        raise UserError(f"evaluation.precision=bf16 is for {wrong}; write evaluation.precision=float32")


@final
class FusedScorer:
    """Computes the log-weights of one model, whose weights must not change meanwhile.

    Args:
        model: one that ``fits`` what it is to score.
        rows: bound on the samples computed at once.
        bf16: products of bfloat16 numbers, for a model in float32.
    """

    def __init__(self, model: LatentVariableModel, rows: int = CHUNK, bf16: bool = False) -> None:
        self._blocks = max(1, min(rows, CHUNK) // BLOCK)
        generative, inference = model.generative, model.inference
        assert isinstance(generative, GaussianChain) and isinstance(inference, GaussianRecognition)
        first, *upwards = inference.layers
        self._first = first
        self._white = generative.likelihood.white
        # Another q is still one to draw from and to score; p must stay what it is, and its Gaussians may be narrow.
        self._upwards = _conditionals(upwards, bf16)
        self._downwards = _conditionals(generative.layers, bf16=False)
        observation = generative.observation
        assert isinstance(observation, TanhNetwork)
        self._body = _Body(observation.body, bf16)
        self._pixels = observation.head.out_features
        self._missing = -self._pixels % (FIRST_GROUPS * SECOND_GROUPS)
        self._head = self._body.then([observation.head], self._missing)

    @staticmethod
    def fits(model: LatentVariableModel, x: Shaped[Tensor, "n pixels"]) -> bool:
        """Whether the parts are those that are known here, nothing derived from them, and every pixel is 0 or 1."""
        generative, inference = model.generative, model.inference
        return bool(
            type(generative) is GaussianChain
            and type(inference) is GaussianRecognition
            and type(generative.likelihood) is Bernoulli
            and type(generative.observation) is TanhNetwork
            and all(type(layer) is GaussianConditional for layer in (*generative.layers, *inference.layers))
            and ((x == 0) | (x == 1)).all()
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
        blocks = -(-k // BLOCK)
        # As many as need be, and of one size.
        chunk = -(-blocks // -(-blocks // self._blocks)) * BLOCK
        buffer = x.new_empty(min(k, chunk), self._pixels + self._missing)
        loc, log_scale = self._first(x / self._white)
        sign = F.pad(2 * x - 1, (0, self._missing), value=1)
        for b in range(len(x)):
            head = self._head.times(sign[b])
            scale, sum_log_scale = log_scale[b].exp(), log_scale[b].sum()
            for start in range(0, k, chunk):
                n = min(chunk, k - start)
                draws = noise(images[b : b + 1], first + start)
                eps = draws.normal(1, n, 1, len(scale))[:, 0]
                latents = [torch.addcmul(loc[b], eps, scale)]
                # 2 log q(h|x) and 2 log p(h), both without d log 2 pi.
                log_q = -2 * sum_log_scale - torch.linalg.vecdot(eps, eps)
                for level, layer in enumerate(self._upwards, start=2):
                    above_loc, above_log_scale = layer(latents[-1])
                    eps = draws.normal(level, n, 1, above_loc.shape[-1])[:, 0]
                    latents.append(torch.addcmul(above_loc, eps, above_log_scale.exp()))
                    log_q -= torch.linalg.vecdot(eps, eps) + 2 * above_log_scale.sum(-1)
                log_p = -torch.linalg.vecdot(latents[-1], latents[-1])
                for layer, below, above in zip(self._downwards, latents, latents[1:], strict=False):
                    below_loc, below_log_scale = layer(above)
                    standardized = (below - below_loc) * torch.exp(-below_log_scale)
                    log_p -= torch.linalg.vecdot(standardized, standardized) + 2 * below_log_scale.sum(-1)
                likelihood = _log_likelihood(self._body(latents[0]), head, buffer[:n])
                torch.add(likelihood, log_p - log_q, alpha=0.5, out=log_w[start : start + n, b])
        return log_w


def _log_likelihood(features: Tensor, head: _Linear, buffer: Tensor) -> Tensor:
    """log p(x|h) of every row of ``features``, by a ``head`` that carries the signs of x."""
    probabilities = head(features, out=buffer).sigmoid_()
    products = probabilities.view(len(buffer), FIRST_GROUPS, -1).prod(1)
    log_p = products.view(len(buffer), SECOND_GROUPS, -1).prod(1).log_().sum(-1)
    if not math.isfinite(log_p.amin()):
        # A product has left the range of the numbers: those samples again, term by term.
        lost = ~log_p.isfinite()
        log_p[lost] = F.logsigmoid(head(features[lost])).sum(-1)
    return log_p


class _Linear:
    """given @ weight + bias; where the weight is of bfloat16, (given - 1/2) @ weight + bias.

    A sigmoid of bfloat16 is as coarse near 1 as near 1/2; without the half, tanh keeps its eight bits at any size.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, given: Tensor, out: Tensor | None = None) -> Tensor:
        if given.dtype == self._weight.dtype:
            return torch.addmm(self._bias, given, self._weight, out=out)
        product = torch.mm((given - 0.5).to(self._weight.dtype), self._weight)
        return (product.to(given.dtype) if out is None else out.copy_(product)).add_(self._bias)

    def times(self, sign: Tensor) -> _Linear:
        """The same with every output times its sign."""
        return _Linear(self._weight * sign.to(self._weight.dtype), self._bias * sign)


class _Body:
    """A tanh network as products and sigmoids; its values are those sigmoids, (tanh + 1) / 2."""

    def __init__(self, body: nn.Sequential, bf16: bool) -> None:
        self._layers: list[_Linear] = []
        self._bf16 = bf16
        for linear in body:
            if isinstance(linear, nn.Linear):
                self._layers.append(self.then([linear], factor=2))

    def then(self, heads: Sequence[nn.Linear], missing: int = 0, factor: int = 1) -> _Linear:
        """What gives of the sigmoids, side by side, ``factor`` times what the ``heads`` give of the tanh.

        Args:
            heads: layers that stand on this network as far as it is built.
            missing: outputs to be added that are always ``CERTAIN``.
            factor: see above.
        """
        weight = torch.cat([head.weight.detach() for head in heads]).t().contiguous() * factor
        bias = torch.cat([head.bias.detach() for head in heads]) * factor
        if self._layers:
            weight = 2 * weight
            # The latents stay in float32: they have no bounds, and their errors would go through all that follows.
            if self._bf16:
                weight = weight.bfloat16()
            else:
                bias = bias - (weight.double().sum(0) / 2).to(bias.dtype)
        return _Linear(F.pad(weight, (0, missing)), F.pad(bias, (0, missing), value=CERTAIN))

    def __call__(self, given: Tensor) -> Tensor:
        for layer in self._layers:
            given = layer(given).sigmoid_()
        return given


class _Conditional:
    """A Gaussian conditional with both of its heads in one product."""

    def __init__(self, conditional: GaussianConditional, bf16: bool) -> None:
        self._body = _Body(conditional.body, bf16)
        self._heads = self._body.then([conditional.loc, conditional.log_scale])

    def __call__(self, given: Tensor) -> tuple[Tensor, ...]:
        return self._heads(self._body(given)).chunk(2, dim=-1)


def _conditionals(layers: Iterable[nn.Module], bf16: bool) -> list[_Conditional]:
    return [_Conditional(layer, bf16) for layer in layers if isinstance(layer, GaussianConditional)]
