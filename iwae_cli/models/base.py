"""The shape of every model: two log-densities that share no parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.func import functional_call

from iwae_cli.core.interfaces import Latents, Model, Observation, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.models.networks import initialize


class GenerativeNetwork(nn.Module, ABC):
    """p(x, h) = p(x|h_1) p(h_1|h_2) ... p(h_L), with parameters theta."""

    @abstractmethod
    def log_likelihood(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x|h), nats."""

    @abstractmethod
    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(h), nats."""

    def forward(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x, h), nats."""
        return self.log_likelihood(x, latents) + self.log_prior(latents)

    @abstractmethod
    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]:
        """``n`` draws (h, x) ~ p(x, h); the latents have shape (1, n, d_l)."""

    @abstractmethod
    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """E[x|h] in the units of x, for pictures."""

    def exact_log_px(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"] | None:
        """log p(x) where it has a closed form, nats; None where it has none."""
        return None


class InferenceNetwork(nn.Module, ABC):
    """q(h|x) = q(h_1|x) q(h_2|h_1) ..., with parameters phi."""

    reparameterized: ClassVar[bool] = True

    @abstractmethod
    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """``k`` draws h ~ q(h|x) for every x, and log q(h|x) in nats, in one pass."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log q(h|x) of given latents, nats."""

    @abstractmethod
    def posterior_means(
        self, x: Float[Tensor, "batch pixels"], draws: int, noise: Noise
    ) -> tuple[Float[Tensor, "batch _"], ...] | None:
        """E_q[h_l|x] for every layer; layers above the first average their mean over ``draws`` of the layer below.

        None for discrete layers, for which active units are not defined.
        """

    def kl_to_prior(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """KL(q(h|x) || N(0, I)) in closed form, nats; only a model of one Gaussian layer has it.

        Raises:
            TypeError: this inference network has no closed form.
        """
        raise TypeError(f"{type(self).__name__} has no closed-form KL to the prior")


@Model.register  # from Python 3.12 on a protocol does not see submodules, which are no attributes of the class
@final
class LatentVariableModel(nn.Module):
    """A generative and an inference network with disjoint parameters.

    Raises:
        ValueError: the two networks share a parameter (gradients would leak between them).
    """

    def __init__(self, generative: GenerativeNetwork, inference: InferenceNetwork) -> None:
        super().__init__()
        shared = {id(p) for p in generative.parameters()} & {id(p) for p in inference.parameters()}
        if shared:
            raise ValueError("the generative and the inference network must not share parameters")
        self.generative = generative
        self.inference = inference

    def draw(self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise) -> Particles:
        """Draw ``k`` samples h ~ q(h|x) for every x and score them under both networks."""
        latents, log_q = self.inference.sample(x, k, noise)

        def rescore() -> Tensor:
            frozen = {name: p.detach() for name, p in self.inference.named_parameters()}
            return functional_call(self.inference, frozen, (x, latents))

        return Particles(
            latents=latents,
            log_p=self.generative(x, latents),
            log_q=log_q,
            reparameterized=self.inference.reparameterized,
            rescore=rescore,
        )

    def forward(self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise) -> Float[Tensor, "k batch"]:
        """log w of ``k`` fresh draws, nats."""
        return self.draw(x, k, noise).log_w


class Networks(NamedTuple):
    """Two networks without initial weights.

    Attributes:
        generative: p(x, h).
        inference: q(h|x).
        output_bias: the parameter of p with which E[x|h] begins at the training mean, whatever h.
        start: its first values, float64.
    """

    generative: GenerativeNetwork
    inference: InferenceNetwork
    output_bias: nn.Parameter
    start: Float64[np.ndarray, " values"]


class Architecture(ABC):
    """A model before its data is known: sizes and choices, checked; ``build`` makes the networks.

    This is what a yaml of ``conf/model`` names.

    Attributes:
        observation: what a pixel of its data is.
        layers: number of stochastic layers.
        discrete: whether they are, so that draws have no gradient.
    """

    observation: Observation
    layers: int
    discrete: ClassVar[bool] = False

    @abstractmethod
    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """The networks for such data, see ``build``; whatever weights they have are replaced.

        Raises:
            UserError: observations of this shape cannot be modelled.
        """

    @final
    def build(
        self,
        image_shape: tuple[int, ...],
        mean: np.ndarray,
        generator: torch.Generator,
        levels: int | None = None,
    ) -> LatentVariableModel:
        """The model, initialized from ``generator``, in float32 on the CPU.

        Args:
            image_shape: shape of one observation; its product is the number of pixels.
            mean: mean of every pixel over the training split, (pixels,), float64; in [0, 1] for binary data,
                in grey levels for grey data.
            generator: a CPU generator that the initial weights are drawn from.
            levels: number of grey levels of the data; what is for binary or real-valued data does not look at it.

        Raises:
            UserError: observations of this shape cannot be modelled.
        """
        generative, inference, output_bias, start = self.networks(image_shape, mean, levels)
        model = LatentVariableModel(generative, inference)
        initialize(model, generator)
        with torch.no_grad():
            output_bias.copy_(torch.from_numpy(start))
        return model
