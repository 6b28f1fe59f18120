"""Classes of a user that are wrong in silence are refused before the first step; those of this package never are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from every_architecture import (
    Categorical,
    GaussianConvolutional,
    GaussianMLP,
    LinearGaussianModel,
    SigmoidBeliefNetwork,
)
from every_objective import CIWAE, ELBO, IWAE, JVI, MIWAE, PIWAE, RWS, TVO, VIMCO, VR
from own_models import Colours, Mixture, MixturePrior, VampMLP
from torch import Tensor, nn
from torch import distributions as D

import iwae_cli
from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import KeyedNoise
from iwae_cli.core.numerics import log_mean_exp, normalized_weights
from iwae_cli.data.base import Data
from iwae_cli.models.base import Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Bits, Conditional, GaussianConditional
from iwae_cli.models.likelihoods import Bernoulli, MLPPixels
from iwae_cli.models.networks import HALF_LOG_2PI
from iwae_cli.models.priors import Prior, StandardNormal
from iwae_cli.objectives.base import BoundObjective
from iwae_cli.training.check import check_outside

OURS = [
    *(IWAE(1), IWAE(2, "dreg"), IWAE(300, "stl"), CIWAE(7, 0.3), ELBO(7), ELBO(1, analytic_kl=True), JVI(4)),
    *(MIWAE(4, 3), PIWAE(4, 3), VR(7, 0.5), VR(7, 2.0), VR(5, -1.0), VR(5, "max"), TVO(7, gradient="covariance")),
    *(RWS(5), RWS(5, "sleep"), VIMCO(4), GaussianMLP([5, 3], [[8], [8]], activation="relu"), MixturePrior(3)),
    *(GaussianMLP([3], [[8]], likelihood="discretized_logistic"), GaussianMLP([3], [[8]], prior=MixturePrior(3))),
    *(GaussianConvolutional(3, [2, 3], 8), SigmoidBeliefNetwork([6, 4]), Categorical(5), LinearGaussianModel([4, 2])),
    VampMLP([2], [[6]]),
]


def words_only(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("part", OURS, ids=words_only)
def test_what_is_right_passes(part: Any) -> None:
    iwae_cli.check(part)


class Own(BoundObjective):
    """IWAE's bound; a test replaces a method."""

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)


def iwae(log_w: Tensor) -> Tensor:
    return log_mean_exp(log_w)


OBJECTIVES: list[tuple[dict[str, Callable[..., Any]], str]] = [
    ({"bound": lambda self, w: iwae(w).mean()}, "Own.bound gives values of shape (), expected (2,) for log-weights of"),
    ({"bound": lambda self, w: w.mean(1)}, "Own.bound gives values of shape (5,), expected (2,)"),
    (
        {"bound": lambda self, w: iwae(w).mean().expand(w.shape[1])},
        "Own.bound gives a value {}, expected {} as without the rest of",
    ),
    ({"bound": lambda self, w: iwae(w) / 20}, "Own.bound gives a value -1.5, expected at most -30, which is log p(x)"),
    ({"bound": lambda self, w: w.logsumexp(0)}, "Own.bound gives a value -28.39, expected at most -30"),
    ({"bound": lambda self, w: (w - w).log().mean(0)}, "Own.bound gives values of -inf, expected finite numbers for"),
    ({"bound": lambda self, w: iwae(w.detach())}, "Own.bound gives values without gradient"),
    ({"bound": lambda self, w: iwae(w) + self.missing}, "Own.bound raised AttributeError: 'Own' object has no"),
    ({"bound": lambda self, w: float(iwae(w).mean())}, "Own.bound gives values that is a float, expected (2,)"),
    (
        {"weights": lambda self, w: -normalized_weights(w)},
        "Own.weights gives a value {}, expected {} by autograd of bound",
    ),
    (
        {"weights": lambda self, w: torch.full_like(w, 1 / len(w))},
        "Own.weights gives a value 0.2, expected {} by autograd",
    ),
    ({"weights": lambda self, w: normalized_weights(w).sum(1)}, "Own.weights gives values of shape (5,), expected (5,"),
    ({"doubly_weights": lambda self, w: normalized_weights(w)}, "Own.doubly_weights gives a value {}, expected {} by"),
    # Its weights are right, but cannot be differentiated as the default of doubly_weights does.
    (
        {"weights": lambda self, w: normalized_weights(w.detach())},
        "Own.doubly_weights gives a value {}, expected {} by",
    ),
    (
        {
            "bound": lambda self, w: iwae(w) + 0 * (w - w).sqrt().sum(0),
            "weights": lambda self, w: normalized_weights(w),
        },
        "Own.weights gives a value {}, expected nan by autograd of bound",
    ),
    ({"losses": lambda self, *rest: -rest[2].log_w.mean()}, "Own.losses gives a Tensor, expected Losses"),
]


def matches(message: str, expected: str) -> bool:
    """Whether the message holds the expected words, {} being any number, and is one short line."""
    place = 0
    for words in expected.split("{}"):
        place = message.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return "\n" not in message and len(message) <= 300


@pytest.mark.parametrize(("methods", "expected"), OBJECTIVES, ids=words_only)
def test_wrong_objectives_are_named(methods: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        iwae_cli.check(type("Own", (Own,), {"__module__": "mine", **methods})(5, "dreg"))
    assert matches(str(caught.value), expected), str(caught.value)


def test_what_may_exceed_log_px_says_so() -> None:
    above = {"bound": lambda self, w: w.logsumexp(0), "lower_bound": False}
    iwae_cli.check(type("Own", (Own,), above)(5))


@pytest.mark.parametrize("known", [CIWAE(7, 0.3), VR(7, 2.0), MIWAE(3, 4), TVO(7), JVI(5)], ids=words_only)
def test_a_bound_alone_has_the_weights_of_the_closed_form(known: Any) -> None:
    own = type("Own", (Own,), {"bound": lambda self, w: known.bound(w)})(known.num_samples)
    log_w = 2 * torch.randn(known.num_samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for method in ("weights", "doubly_weights"):
            torch.testing.assert_close(getattr(own, method)(log_w), getattr(known, method)(log_w))


class OwnGaussian(GaussianConditional):
    """A diagonal Gaussian; a test replaces a method."""


def lacking(self: Any, h: Tensor, given: Tensor) -> Tensor:
    """The log-density of a Gaussian without -log_scale, which is zero where a log-scale begins at zero."""
    loc, log_scale = self(given)
    return (-0.5 * ((h - loc) * (-log_scale).exp()).square()).sum(-1) - h.shape[-1] * HALF_LOG_2PI


def sample(self: Any, given: Tensor, k: int, batch: int, level: int, noise: Any) -> tuple[Tensor, Tensor]:
    loc, log_scale = self(given)
    h = loc + log_scale.exp() * noise.normal(level, k, batch, loc.shape[-1])
    return h, self.log_prob(h, given)


def without_gradient(self: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    h = sample(self, *rest)[0].detach()
    return h, self.log_prob(h, rest[0])


def of_the_batch(self: Any, given: Tensor) -> tuple[Tensor, Tensor]:
    loc, log_scale = GaussianConditional.forward(self, given - given.mean(-2, keepdim=True))
    return loc, log_scale


def without_derivative(self: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    h, log_p = sample(self, *rest)
    return h + 0 * (h - h).sqrt(), log_p


CONDITIONALS: list[tuple[dict[str, Any], str]] = [
    ({"log_prob": lacking}, "OwnGaussian.sample gives a log-density {}, expected {} as log_prob gives it"),
    ({"log_prob": lacking, "sample": sample}, "OwnGaussian.sample gives a log-density {}, expected {} by the change"),
    ({"sample": lambda self, *rest: sample(self, *rest)[0]}, "OwnGaussian.sample gives a Tensor, expected a pair"),
    ({"sample": lambda self, *r: (sample(self, *r)[0][0], 0)}, "OwnGaussian.sample gives draws of shape (2, 3)"),
    ({"sample": lambda self, given: None}, "OwnGaussian.sample raised TypeError: "),
    ({"sample": without_gradient}, "OwnGaussian.sample gives draws without gradient, expected smooth functions"),
    ({"sample": without_derivative}, "OwnGaussian.sample gives draws whose derivative is not finite, expected smooth"),
    ({"forward": of_the_batch}, "OwnGaussian.log_prob gives a log-density {}, expected {} as without the other rows"),
    ({"log_prob": lambda self, h, given: h.sum()}, "OwnGaussian.log_prob gives a log-density of shape ()"),
    ({"log_prob": lambda self, h, given: h.sum(-1) * math.nan}, "OwnGaussian.log_prob gives a log-density of nan"),
]  # fmt: skip


def of_two(split: bool, level: int | None = None) -> Callable[..., Any]:
    """h = loc + scale (.6 e + .8 e'), by two draws or by one that is split; ``level`` replaces the given one."""

    def drawn(self: Any, given: Tensor, k: int, batch: int, of: int, noise: Any) -> tuple[Tensor, Tensor]:
        (loc, log_scale), of = self(given), of if level is None else level
        d = loc.shape[-1]
        if split:
            first, second = noise.normal(of, k, batch, 2 * d).chunk(2, -1)
        else:
            first, second = noise.normal(of, k, batch, d), noise.normal(of, k, batch, d)
        h = loc + log_scale.exp() * (0.6 * first + 0.8 * second)
        return h, self.log_prob(h, given)

    return drawn


@pytest.mark.parametrize("in_q", [True, False], ids=["q", "p"])
def test_two_draws_that_an_evaluation_makes_one_are_refused(in_q: bool) -> None:
    def own(split: bool, level: int | None = None) -> OwnModel:
        return OwnModel(type("Own", (OwnGaussian,), {"sample": of_two(split, level)}), in_q)

    first, second = (KeyedNoise(0, "test", [0]).normal(1, 3, 1, 4) for _ in range(2))
    assert torch.equal(first, second)
    iwae_cli.check(own(split=True))
    with pytest.raises(UserError, match=r"^Own\.sample draws noise\.normal\(1, \.\.\.\) twice, .* of twice the size"):
        iwae_cli.check(own(split=False))
    # The number of another layer, whose draws would be the same.
    with pytest.raises(UserError, match=r"Chain\.sample draws noise\.normal\(2, \.\.\.\) twice, .* sample is given"):
        iwae_cli.check(own(split=True, level=2))


class OwnModel(GaussianMLP):
    """A model of this package, with a conditional of a user in place of q or of p(h_1|h_2)."""

    def __init__(self, cls: type[nn.Module], in_q: bool) -> None:
        super().__init__([3, 2], [[8], [8]])
        self.cls, self.in_q = cls, in_q

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        made = super().networks(image_shape, mean, levels)
        if self.in_q:
            made.inference.layers[0] = self.cls(len(mean), [8], 3)  # type: ignore[index]
        else:
            made.generative.layers[0] = self.cls(2, [8], 3)  # type: ignore[index]
        return made


@pytest.mark.parametrize("in_q", [True, False], ids=["q", "p"])
@pytest.mark.parametrize(
    ("methods", "expected"), CONDITIONALS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_wrong_conditionals_are_named(methods: dict[str, Any], expected: str, in_q: bool) -> None:
    if "without gradient" in expected and not in_q:
        pytest.skip("nothing differentiates through the draws of p")
    with pytest.raises(UserError) as caught:
        iwae_cli.check(OwnModel(type("OwnGaussian", (OwnGaussian,), {"__module__": "mine", **methods}), in_q))
    assert matches(str(caught.value), expected), str(caught.value)


class OwnLayers(GaussianMLP):
    """A Gaussian model with another module in q."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__([3], [[8]])
        self.module = module

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        made = super().networks(image_shape, mean, levels)
        made.inference.layers[0].body.append(self.module)
        return made


def test_what_differs_in_training_mode_alone_is_refused() -> None:
    norm = nn.BatchNorm1d(8)
    state = torch.random.get_rng_state()
    for module, words in ((nn.Dropout(), "in a second call"), (norm, "beside another row of the batch")):
        with pytest.raises(
            UserError, match=rf"^GaussianConditional\.log_prob gives .* as {words}, both in training mode"
        ):
            iwae_cli.check(OwnLayers(module))
    assert torch.equal(torch.random.get_rng_state(), state) and not norm.num_batches_tracked and not norm.training
    iwae_cli.check(OwnLayers(nn.LayerNorm(8)))


class Coins(Bits):
    """Independent bits on layers of hidden units."""

    def __init__(self, inputs: int, hidden: list[int], outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden[0]), nn.Tanh(), nn.Linear(hidden[0], outputs))

    def forward(self, given: Tensor) -> Tensor:
        return self.body(given)


def test_an_architecture_must_say_that_its_latents_are_discrete() -> None:
    def of_bits(discrete: bool) -> OwnModel:
        return type("OfBits", (OwnModel,), {"discrete": discrete})(Coins, in_q=True)

    iwae_cli.check(of_bits(True))
    words = r"^OfBits\.discrete is False, and reparameterized of its q is False: write discrete = True"
    with pytest.raises(UserError, match=words):
        iwae_cli.check(of_bits(False))
    with pytest.raises(UserError, match=words):
        check_outside(IWAE(5), of_bits(False), drawn())
    with pytest.raises(
        UserError, match=r"^OfNone\.discrete is True, and reparameterized of its q is True: write discrete = False"
    ):
        iwae_cli.check(type("OfNone", (GaussianMLP,), {"discrete": True})([3], [[8]]))


class OwnPixels(MLPPixels):
    """Pixels of a user."""


class OwnBinary(GaussianMLP):
    """A model of binary pixels with another observation or another chain."""

    pixels: type = OwnPixels
    chain: type = InferenceChain

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        made, likelihood = super().networks(image_shape, mean, levels), Bernoulli(mean)
        pixels = self.pixels(3, [8], len(mean), likelihood)
        return Networks(
            GenerativeChain(StandardNormal(3), pixels, []),
            self.chain(list(made.inference.layers)),
            pixels.head.bias,
            likelihood.initial_bias(),
        )


def of(**classes: type) -> OwnBinary:
    return type("OwnBinary", (OwnBinary,), classes)([3], [[8]])


def drawn() -> Data:
    return Colours().load()


def test_the_networks_of_a_user_are_checked_on_the_data_of_a_run() -> None:
    check_outside(IWAE(5), of(), drawn())
    certain = type(
        "Certain", (OwnPixels,), {"log_prob": lambda self, h, given: MLPPixels.log_prob(self, h, given) + 99}
    )
    with pytest.raises(UserError, match=r"Certain.sample gives a log-density"):
        check_outside(IWAE(5), of(pixels=certain), drawn())

    def louder(self: Any, given: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        x, _ = MLPPixels.sample(self, given, *rest)
        return x, self.log_prob(x, given)

    with pytest.raises(UserError, match=r"Louder.log_prob gives a log-density that is too high by about 9\d"):
        check_outside(IWAE(5), of(pixels=type("Louder", (certain,), {"sample": louder})), drawn())

    def half_of_q(self: Any, *rest: Any) -> tuple[Any, Tensor]:
        latents, log_q = InferenceChain.sample(self, *rest)
        return latents, log_q / 2

    half = type("Half", (InferenceChain,), {"sample": half_of_q})
    with pytest.raises(UserError, match=r"Half.sample gives log q\(h\|x\) .*, expected .* as forward gives it"):
        check_outside(IWAE(5), of(chain=half), drawn())


class Halved(InferenceChain):
    """A chain whose log-density is halved in the draws and in the density."""

    def sample(self, x: Tensor, k: int, noise: Any = None) -> tuple[Any, Tensor]:
        latents, log_q = super().sample(x, k, noise)
        return latents, log_q / 2

    def forward(self, x: Tensor, latents: Any) -> Tensor:
        return super().forward(x, latents) / 2


class Centred(InferenceChain):
    """A chain that gives its first layer 2 x - 1, so that its factors are not its layers given x."""

    def sample(self, x: Tensor, k: int, noise: Any = None) -> tuple[Any, Tensor]:
        return super().sample(2 * x - 1, k, noise)

    def forward(self, x: Tensor, latents: Any) -> Tensor:
        return super().forward(2 * x - 1, latents)


class WithoutPrior(GenerativeChain):
    """A chain that forgets log p(h)."""

    def forward(self, x: Tensor, latents: Any) -> Tensor:
        return self.log_likelihood(x, latents)


@pytest.mark.parametrize("of_q", [GaussianMLP([3, 2], [[8], [8]]), SigmoidBeliefNetwork([6, 4])], ids=words_only)
def test_chains_of_a_user_are_checked_as_a_whole(of_q: Any) -> None:
    model = built(of_q)
    layers = list(model.inference.layers)
    model.inference = Centred(layers)
    iwae_cli.check(model)
    model.inference = Halved(layers)
    with pytest.raises(UserError, match=r"^Halved\.(sample gives .* change of variables|log_prob gives .* too high)"):
        iwae_cli.check(model)
    model = built(of_q)
    p = model.generative
    model.generative = WithoutPrior(p.prior, p.observation, list(p.layers))
    with pytest.raises(
        UserError, match=r"^WithoutPrior\.forward gives log p\(x, h\) .* as log_likelihood and log_prior"
    ):
        iwae_cli.check(model)


def test_data_that_the_model_cannot_observe_are_refused() -> None:
    grey = torch.full((4, 64), 9, dtype=torch.uint8)
    data = Data("own", "four images", grey, grey, grey, levels=17, binarization="none", image_shape=(8, 8))
    with pytest.raises(UserError, match="train split of own: x must be 0 or 1 for Bernoulli, got values from 9 to 9"):
        check_outside(IWAE(5), of(), data)


def test_the_data_of_every_run_are_looked_at() -> None:
    """Also under a model of this package: a class of a user may say other levels than its likelihood has."""
    grey, white = torch.full((4, 64), 9, dtype=torch.uint8), torch.ones(4, 64, dtype=torch.uint8)
    of = {"levels": 17, "binarization": "none", "image_shape": (8, 8)}
    with pytest.raises(UserError, match="test split of own: x must be 0 or 1 for Bernoulli, got values from 9 to 9"):
        check_outside(IWAE(5), GaussianMLP([3], [[8]]), Data("own", "four images", white, white, grey, **of))
    real, broken = torch.rand(4, 64), torch.rand(4, 64).index_fill(1, torch.tensor([7]), math.nan)
    model, of = GaussianMLP([3], [[8]], likelihood="gaussian"), of | {"levels": None}
    check_outside(IWAE(5), model, Data("own", "four images", real, real, real, **of))
    with pytest.raises(UserError, match="test split of own: x must be finite for Gaussian, got values from nan to nan"):
        check_outside(IWAE(5), model, Data("own", "four images", real, real, broken, **of))
    with pytest.raises(UserError, match="train split of own: x must be 0 or 1 for Bernoulli, got values from 0"):
        check_outside(IWAE(5), GaussianMLP([3], [[8]]), Data("own", "four images", real, real, real, **of))


class Unfinished(Bits):
    """Bits without ``forward``."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__()


class Abstract(Conditional):
    """A conditional that lacks its methods."""


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(Unfinished, "Unfinished.sample raised NotImplementedError: "), (Abstract, "OwnModel.build raised TypeError: ")],
)
def test_errors_in_code_of_a_user_are_one_line(cls: type[nn.Module], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        iwae_cli.check(OwnModel(cls, in_q=True))
    assert (matches(str(caught.value), expected) and "(test_check.py, line" in str(caught.value)) or cls is Unfinished


@dataclass(eq=False)
class PriorOf(Prior):
    """Settings of a prior of a user: what ``make`` returns for a number of units."""

    make: Callable[[int], Conditional]

    def build(self, size: int) -> Conditional:
        return self.make(size)


def test_a_prior_builds_a_conditional() -> None:
    with pytest.raises(UserError, match=r"^PriorOf\.build gives a Normal, expected a Conditional"):
        iwae_cli.check(PriorOf(lambda size: D.Normal(torch.zeros(size), 1.0)))


class Drawn(Conditional):
    """Independent units of a distribution of torch, whose log-density is moved by a constant."""

    def __init__(self, units: torch.distributions.Distribution, off: float) -> None:
        super().__init__()
        self.units, self.off = units, off

    def sample(self, given: Tensor | None, k: int, batch: int, level: int, noise: Any) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(noise.uniform(level, k, batch, 1).sum() * 1e6))
            h = self.units.sample((k, batch))
        return h, self.log_prob(h, given)

    def log_prob(self, h: Tensor, given: Tensor | None) -> Tensor:
        return self.units.log_prob(h).reshape(*h.shape[:-1], -1).sum(-1) + self.off

    def mean(self, given: Tensor | None) -> None:
        return None


@pytest.mark.parametrize("off", [0.0, 0.7, -0.7], ids=["right", "high", "low"])
@pytest.mark.parametrize(
    "of",
    [
        *(lambda o: D.Laplace(o, o), lambda o: D.Cauchy(o, o), lambda o: D.Uniform(-o, o), lambda o: D.Exponential(o)),
        *(lambda o: D.Gumbel(o, o), lambda o: D.StudentT(3 * o), lambda o: D.Beta(0.5 * o, 0.5 * o)),
        *(lambda o: D.Bernoulli(0.3 * o), lambda o: D.Poisson(3 * o), lambda o: D.Normal(o, 1e-3 * o)),
    ],
)
def test_a_prior_without_its_normalizer_is_refused_whatever_it_is(of: Any, off: float) -> None:
    prior = PriorOf(lambda size: Drawn(of(torch.ones(size)), off))
    if not off:
        return iwae_cli.check(prior)
    with pytest.raises(UserError, match=r"Drawn\.log_prob gives a log-density that is too") as e:
        iwae_cli.check(prior)
    assert abs(abs(float(re.findall("about (.*) nats", str(e.value))[0])) - abs(off)) < 0.3
    assert ("high" in str(e.value)) == (off > 0)


class Uncopied(Drawn):
    """A class that refuses to be copied, which a training does not need."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


def test_what_cannot_be_copied_is_checked_as_it_is() -> None:
    iwae_cli.check(PriorOf(lambda size: Uncopied(D.Laplace(torch.zeros(size), torch.ones(size)), 0.0)))
    with pytest.raises(UserError, match="too high"):
        iwae_cli.check(PriorOf(lambda size: Uncopied(D.Laplace(torch.zeros(size), torch.ones(size)), 0.7)))


class Mapped(Conditional):
    """A function of one normal vector, with a log-density of its own."""

    def __init__(self, of: Callable[[Tensor], Tensor], log_p: Callable[[Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.of, self.log_p, self.size = of, log_p, size

    def sample(self, given: None, k: int, batch: int, level: int, noise: Any) -> tuple[Tensor, Tensor]:
        h = self.of(noise.normal(level, k, batch, self.size))
        return h, self.log_p(h)

    def log_prob(self, h: Tensor, given: None) -> Tensor:
        return self.log_p(h)

    def mean(self, given: None) -> None:
        return None


def normal(h: Tensor) -> Tensor:
    return -(h.square() + math.log(2 * math.pi)).sum(-1) / 2


def folded(h: Tensor) -> Tensor:
    return D.Normal(0.5, 1.0).log_prob(h).logaddexp(D.Normal(-0.5, 1.0).log_prob(h)).sum(-1)


def ordered(h: Tensor) -> Tensor:
    return torch.where((h.diff() >= 0).all(-1), normal(h) + math.lgamma(h.shape[-1] + 1), -math.inf)


def on_a_sphere(e: Tensor) -> Tensor:
    return e / e.norm(dim=-1, keepdim=True)


def constant(log_p: float) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.full(h.shape[:-1], log_p)


@pytest.mark.parametrize(
    "prior",
    [
        PriorOf(lambda _: Mapped(lambda e: (e + 0.5).abs(), folded, 8)),
        PriorOf(lambda _: Mapped(lambda e: e.sort(-1).values, ordered, 8)),
        PriorOf(lambda _: Mapped(on_a_sphere, constant(-3.0), 8)),
        PriorOf(lambda _: Mapped(on_a_sphere, constant(-math.log(2 * math.pi)), 2)),
        PriorOf(lambda _: Mapped(lambda e: (torch.sigmoid(e) * 5).floor() / 2 - 1, constant(-8 * math.log(5)), 8)),
        PriorOf(lambda _: Drawn(D.Dirichlet(torch.ones(4)), 0.0)),
    ],
    ids=["folded", "sorted", "sphere", "circle", "codes", "simplex"],
)
def test_maps_without_an_inverse_and_surfaces_pass(prior: Prior) -> None:
    iwae_cli.check(prior)


def heavy(h: Tensor) -> Tensor:
    """Log-density of sinh(2 e), half a nat too high in all: no density that is fitted to its draws shows that."""
    return normal(h.asinh() / 2) - (2 * (1 + h.square()).sqrt()).log().sum(-1) + 0.5


@pytest.mark.parametrize(
    ("of", "log_p", "size"),
    [
        (lambda e: 2 * e, normal, 4),
        # 0.3 e has a log-density that is log(1 / 0.3), or 1.2 nats a unit, above that of e; 2 are too many.
        *((lambda e: e * 0.3, lambda h: normal(h / 0.3) + 2.0 * h.shape[-1], size) for size in (1, 8)),
        (lambda e: (2 * e).sinh(), heavy, 50),
    ],
    ids=["wide", "one unit", "eight units", "heavy tails"],
)
def test_wrong_densities_of_maps_are_refused(of: Any, log_p: Any, size: int) -> None:
    with pytest.raises(UserError, match=r"Mapped\.sample gives a log-density .* by the change of variables"):
        iwae_cli.check(PriorOf(lambda _: Mapped(of, log_p, size)))


def test_a_prior_that_denies_some_of_its_draws_is_refused() -> None:
    """It denies 4% of them, none of the few whose log-densities are compared first."""

    class Denied(Drawn):
        def log_prob(self, h: Tensor, given: Tensor | None) -> Tensor:
            return super().log_prob(h, given).masked_fill(h[..., 0] > 0.96, -math.inf)

    with pytest.raises(UserError, match=r"^Denied\.log_prob gives a log-density that is too low by about inf nats"):
        iwae_cli.check(PriorOf(lambda size: Denied(D.Uniform(torch.zeros(size), torch.ones(size)), 0.0)))


@pytest.mark.parametrize("off", [0.0, 0.7, -0.7])
def test_a_rounded_map_is_tested_by_its_integral(off: float) -> None:
    """Its derivative is zero, and says nothing."""

    def log_p(h: Tensor) -> Tensor:
        above, below = (D.Normal(0.0, 1.0).cdf(h + side) for side in (0.5, -0.5))
        return (above - below).log().sum(-1) + off

    prior = PriorOf(lambda size: Mapped(torch.round, log_p, size))
    if not off:
        return iwae_cli.check(prior)
    with pytest.raises(UserError, match=r"Mapped\.log_prob gives a log-density that is too (high|low) by about 0\.\d"):
        iwae_cli.check(prior)


def moved(cls: Any, nats: float) -> type:
    """A class of a user whose log-density, also that of its draws, is ``nats`` too high."""

    def log_prob(self: Any, h: Tensor, given: Any) -> Tensor:
        return cls.log_prob(self, h, given) + nats

    def sample(self: Any, given: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        h = cls.sample(self, given, *rest)[0]
        return h, self.log_prob(h, given)

    return type(f"Own{cls.__name__}", (cls,), {"__module__": "mine", "log_prob": log_prob, "sample": sample})


def with_class(model: Any, find: Callable[[Any], nn.Module], nats: float) -> Any:
    """The model with one conditional of a user."""
    part = find(model)
    part.__class__ = moved(type(part), nats)
    return model


MODELS: list[tuple[Any, Callable[[Any], nn.Module], float]] = [
    (lambda: built(GaussianMLP([50], [[8]], prior="mixture", prior_components=10)), lambda m: m.generative.prior, 2.3),
    (lambda: built(SigmoidBeliefNetwork([6, 4])), lambda m: m.generative.prior, 0.7),
    (lambda: built(SigmoidBeliefNetwork([40, 4])), lambda m: m.inference.layers[0], 3),
    (lambda: built(SigmoidBeliefNetwork([40, 4])), lambda m: m.generative.layers[0], -3),
    (lambda: built(Categorical(5)), lambda m: m.inference.layers[0], 0.7),
    (lambda: built(GaussianMLP([3], [[8]], posterior="mixture")), lambda m: m.inference.layers[0], 1.0),
    (lambda: built(GaussianMLP([3], [[8]])), lambda m: m.generative.observation, -4.0),
    (
        lambda: built(GaussianMLP([3], [[8]], likelihood="discretized_logistic"), 17),
        lambda m: m.generative.observation,
        20.0,
    ),
    (
        lambda: built(GaussianMLP([3], [[8]], likelihood="gaussian"), None, 28),
        lambda m: m.generative.observation,
        -30.0,
    ),
]


def built(architecture: Any, levels: int | None = 2, side: int = 8) -> Any:
    model = architecture.build((side, side), np.full(side * side, 0.5), torch.Generator().manual_seed(0), levels)
    return model.eval()


@pytest.mark.parametrize(("make", "find", "nats"), MODELS)
def test_a_density_without_its_normalizer_is_refused_at_every_seam(make: Any, find: Any, nats: float) -> None:
    iwae_cli.check(with_class(make(), find, 0.0))
    with pytest.raises(UserError) as caught:
        iwae_cli.check(with_class(make(), find, nats))
    direction = "high" if nats > 0 else "low"
    found = str(caught.value)
    assert f".log_prob gives a log-density that is too {direction} by about" in found or "change of variables" in found


def test_a_log_scale_that_begins_at_zero_is_not_forgotten() -> None:
    """It has two dimensions, one for the components."""

    class Unscaled(Mixture):
        def log_prob(self, h: Tensor, given: None) -> Tensor:
            standardized = (h[..., None, :] - self.loc) * torch.exp(-self.log_scale)
            return (torch.log_softmax(self.logits, 0) + normal(standardized)).logsumexp(-1)

    prior = PriorOf(lambda size: Unscaled(4, size))
    for part in (prior, GaussianMLP([3], [[8]], prior=prior)):
        with pytest.raises(UserError, match=r"Unscaled\.log_prob gives a log-density that is too (high|low)"):
            iwae_cli.check(part)


def test_a_mixture_of_many_components_is_checked_as_a_prior_of_one_unit() -> None:
    class Unweighted(Mixture):
        def log_prob(self, h: Tensor, given: None) -> Tensor:
            return super().log_prob(h, given) + math.log(len(self.loc))

    prior = PriorOf(lambda size: Unweighted(100, size))
    with pytest.raises(UserError, match=r"Unweighted.log_prob .* too high by about 4\.\d+ nats"):
        check_outside(IWAE(5), GaussianMLP([50], [[8]], prior=prior), drawn())


def test_our_own_classes_are_not_checked_before_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IWAE, "bound", lambda self, log_w: log_w.logsumexp(0))
    check_outside(IWAE(5), GaussianMLP([3], [[8]]), drawn())
    with pytest.raises(UserError):
        iwae_cli.check(IWAE(5))
    with pytest.raises(TypeError, match="part must be an objective, a model or a prior, got int"):
        iwae_cli.check(3)
