"""A model: two log-densities, and the settings that build them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from iwae_cli.core.errors import check_range
from iwae_cli.core.interfaces import Latents, Model, Observation, Particles
from iwae_cli.core.noise import Noise, derive
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Conditional
from iwae_cli.models.kl import find_kl
from iwae_cli.models.likelihoods import Gaussian


@Model.register  # from Python 3.12 on a protocol does not see submodules, which are no attributes of the class
class LatentVariableModel(nn.Module):
    """A generative and an inference network, which may share parameters where one loss trains both."""

    def __init__(self, generative: GenerativeChain, inference: InferenceChain) -> None:
        super().__init__()
        self.generative = generative
        self.inference = inference

    def draw(self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise | None = None) -> Particles:
        """Return ``k`` samples h ~ q(h|x) for every x, scored under both networks; ``noise`` as in ``sample`` of both.

        Raises:
            ValueError: see ``GenerativeChain.require_observable``; not in training mode, whose steps do not pay for it.
        """
        if not self.training:
            self.generative.require_observable(x)
        latents, log_q = self.inference.sample(x, k, noise)

        def rescore() -> Tensor:
            frozen = {name: p.detach() for name, p in self.inference.named_parameters()}
            return functional_call(self.inference, frozen, (x, latents))

        return Particles(latents, self._log_p(x, latents), log_q, self.inference.reparameterized, rescore)

    def _log_p(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        return self.generative(x, latents)

    def forward(self, x: Shaped[Tensor, "*n pixels"], k: int, noise: Noise | None = None) -> Float[Tensor, "k batch"]:
        """Return log w of ``k`` draws of h ~ q(h|x), nats.

        Args:
            x: observations, (batch, pixels), also integers such as those of ``Split.x``.
            k: draws of each, at least 1.
            noise: of the draws; None is ``default_noise``, the same for equal calls.

        Raises:
            ValueError: another shape, no draw, or see ``GenerativeChain.require_observable``.
        """
        check_range("k", k, 1)
        if x.dim() != 2:
            raise ValueError(f"x must be (batch, pixels), got {tuple(x.shape)}; of one observation x[None]")
        self.generative.require_observable(x)
        return self.draw(x.to(next(self.parameters()).dtype), k, noise).log_w

    @property
    def has_kl(self) -> bool:
        """Whether KL(q(h|x) || p(h)) has a closed form that is registered, see ``kl.register_kl``."""
        return find_kl(self.inference, self.generative) is not None

    def kl(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """Return KL(q(h|x) || p(h)) in closed form, nats.

        Raises:
            TypeError: unless ``has_kl``.
        """
        found = find_kl(self.inference, self.generative)
        if found is None:
            raise TypeError("no closed form of KL(q(h|x) || p(h)) is registered for these networks")
        return found(x)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names in p of the parameters that q has too."""
        of_q = {id(p) for p in self.inference.parameters()}
        return tuple(name for name, p in self.generative.named_parameters() if id(p) in of_q)


class Networks(NamedTuple):
    """Two networks without initial weights.

    Attributes:
        generative: p(x, h).
        inference: q(h|x).
        output_bias: the parameter of p with which E[x|h] begins at the training mean, for any h.
        start: its first values, float64.
    """

    generative: GenerativeChain
    inference: InferenceChain
    output_bias: nn.Parameter
    start: Float64[np.ndarray, " values"]


class Architecture(ABC):
    """A model before its data is known: checked sizes and choices, which the yaml of ``conf/model`` describes.

    Attributes:
        observation: kind of the pixels of its data.
        layers: number of stochastic layers.
        discrete: whether any of them is discrete, so that its draws have no gradient.
    """

    observation: Observation
    layers: int
    discrete: bool = False

    @abstractmethod
    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """Return the networks for such data, see ``build``, whose weights are replaced; UserError for wrong shapes."""

    @final
    def build(
        self,
        image_shape: tuple[int, ...],
        mean: np.ndarray,
        generator: torch.Generator,
        levels: int | None = None,
        std: float = 1.0,
    ) -> LatentVariableModel:
        """Return the model in float32 on the CPU, with weights drawn from ``generator``.

        Args:
            image_shape: (height, width), (channels, height, width) or (pixels,).
            mean: mean of every pixel over the training split, (pixels,), float64; in [0, 1] for binary data,
                in grey levels for grey data.
            generator: of the CPU. Its seed also decides the values that modules draw themselves.
            levels: number of grey levels of the data; models of binary or real-valued data ignore it.
            std: standard deviation of real-valued data about their means; where a learned scale of p(x|h) begins.

        Raises:
            UserError: observations of this shape cannot be modelled.
        """
        # What draws its own initial values, such as nn.Embedding, takes them from torch's default generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(generator.initial_seed(), "networks") >> 65)
            generative, inference, output_bias, start = self.networks(image_shape, mean, levels)
        model = LatentVariableModel(generative, inference)
        # Glorot-uniform weights (Glorot and Bengio 2010) in the order of the modules, zero biases.
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(part.weight, generator=generator)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            if isinstance(part, Conditional):
                part.initialize(generator)
            if isinstance(part, Gaussian):
                part.start_at(std)
        with torch.no_grad():
            output_bias.copy_(torch.from_numpy(start))
        return model

    @final
    def outline(self, image_shape: tuple[int, ...], levels: int | None) -> LatentVariableModel:
        """Return the networks for such data with arbitrary weights, to check what fits them; see ``build``."""
        mean = np.full(math.prod(image_shape), 0.5)
        return LatentVariableModel(*self.networks(image_shape, mean, levels)[:2])
