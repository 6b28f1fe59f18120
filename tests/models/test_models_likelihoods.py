"""Distributions of a pixel: masses from scipy, sums over every level, frequencies of draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import noise
from scipy import stats
from torch import Tensor

from iwae_cli.core.noise import Noise
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, make_likelihood


def values(loc: list[float], log_scale: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, 1, 2 pixels)."""
    return torch.tensor([[[*loc, *log_scale]]], dtype=dtype)


def every_level(likelihood: DiscretizedLogistic, loc: float, log_scale: float) -> Tensor:
    """log P(x = v) for every level v, of one pixel."""
    x = torch.arange(likelihood.white + 1, dtype=torch.float64)[:, None]
    return likelihood.log_prob(x, values([loc], [log_scale]).expand(1, len(x), 2))[0]


LOCATIONS = [(-3.0, -2.0), (0.0, -5.0), (0.1, -1.0), (0.5, -3.0), (0.5, 2.0), (0.99, -6.0), (7.0, -4.0), (0.3, -30.0)]


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize(("loc", "log_scale"), LOCATIONS)
def test_the_masses_of_all_levels_sum_to_one(levels: int, loc: float, log_scale: float) -> None:
    log_mass = every_level(DiscretizedLogistic(np.zeros(1), levels), loc, log_scale)
    assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("loc", "log_scale"), [p for p in LOCATIONS if p[1] > -6])
def test_the_masses_are_those_of_a_logistic(loc: float, log_scale: float) -> None:
    levels = 17
    edges = np.concatenate([[-np.inf], (np.arange(levels - 1) + 0.5) / (levels - 1), [np.inf]])
    law = stats.logistic(loc, math.exp(log_scale))
    # From the nearer tail, where scipy's difference of nearly equal numbers is still good.
    masses = np.maximum(np.diff(law.cdf(edges)), -np.diff(law.sf(edges)))
    found = every_level(DiscretizedLogistic(np.zeros(1), levels), loc, log_scale).exp().numpy()
    np.testing.assert_allclose(found, masses, rtol=1e-7, atol=1e-15)


def test_two_levels_are_a_bernoulli() -> None:
    generator = torch.Generator().manual_seed(0)
    loc, log_scale = (torch.randn(4, 3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randint(2, (3, 6), generator=generator).double()
    logistic = DiscretizedLogistic(np.zeros(6), 2).log_prob(x, torch.cat([loc, log_scale], -1))
    bernoulli = Bernoulli(np.zeros(6)).log_prob(x, (loc - 0.5) * torch.exp(-log_scale))
    torch.testing.assert_close(logistic, bernoulli, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_have_a_finite_value_and_gradient(dtype: torch.dtype) -> None:
    """A difference of two sigmoids would be log 0 here; the density far out falls like exp(-distance / scale)."""
    likelihood = DiscretizedLogistic(np.zeros(3), 256)
    x = torch.tensor([[0.0, 100.0, 255.0]], dtype=dtype)
    at = values([50.0, -50.0, -50.0], [-3.0, -3.0, -3.0], dtype).requires_grad_()
    log_p = likelihood.log_prob(x, at)
    expected = sum(-abs(edge / 255 - m) * math.exp(3) for edge, m in ((0.5, 50), (99.5, -50), (254.5, -50)))
    expected += math.log(-math.expm1(-math.exp(3) / 255))
    assert log_p.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(log_p.sum(), at)
    assert gradient.isfinite().all()
    assert gradient[..., :3].abs().min() > 1


def test_the_gradient_is_that_of_finite_differences() -> None:
    likelihood = DiscretizedLogistic(np.zeros(4), 5)
    x = torch.tensor([[0.0, 1.0, 3.0, 4.0]], dtype=torch.float64)
    at = values([0.1, 0.4, 0.2, 1.3], [-1.0, -2.0, 0.3, -0.5]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: likelihood.log_prob(x, v), at)


def test_pixels_are_summed_in_float64() -> None:
    """784 grey pixels of about -5 nats: float32 would keep four decimals of the sum, a mean NLL needs more."""
    likelihood = DiscretizedLogistic(np.zeros(784), 256)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (1, 784), generator=generator).float()
    at = torch.cat([torch.rand(1, 1, 784, generator=generator), torch.full((1, 1, 784), -2.0)], -1)
    found = likelihood.log_prob(x, at)
    assert found.dtype == torch.float64
    one_by_one = [likelihood.log_prob(x[:, [i]], at[..., [i, 784 + i]]).item() for i in range(784)]
    assert found.item() == pytest.approx(math.fsum(one_by_one), rel=1e-13)
    assert likelihood.log_prob(x.double(), at.double()).item() == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize(("loc", "log_scale"), [(0.1, -2.0), (0.5, -1.0), (0.97, -2.5), (-1.0, -0.5)])
def test_draws_and_mean_follow_the_masses(loc: float, log_scale: float) -> None:
    likelihood, n = DiscretizedLogistic(np.zeros(1), 6), 20_000
    mass = every_level(likelihood, loc, log_scale).exp().numpy()
    at = values([loc], [log_scale]).expand(1, n, 2)
    drawn = likelihood.sample(at, noise())[0, :, 0].numpy()
    counts = np.array([(drawn == v).sum() for v in range(6)])
    assert counts.sum() == n
    rare = mass * n < 5
    assert counts[rare].sum() <= 20
    scaled = mass[~rare] * counts[~rare].sum() / mass[~rare].sum()
    assert stats.chisquare(counts[~rare], scaled).pvalue > 1e-3
    assert likelihood.mean(values([loc], [log_scale])).item() == pytest.approx(mass @ np.arange(6), rel=1e-9)


def test_a_draw_at_the_end_of_the_uniform_numbers_is_a_level() -> None:
    class Zeros(Noise):
        def uniform(self, layer: int, k: int, batch: int, size: int) -> Tensor:
            return torch.zeros(k, batch, size, dtype=torch.float64)

    assert DiscretizedLogistic(np.zeros(1), 6).sample(values([0.5], [0.0]), Zeros()).item() == 0


def test_bernoulli() -> None:
    likelihood = Bernoulli(np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(1 / (1 + np.exp(-likelihood.initial_bias())), [0.001, 0.25, 0.999], rtol=1e-12)
    logits = torch.tensor([[[2.0, -1.0, 0.5]]], dtype=torch.float64)
    for x in ([0.0, 0.0, 1.0], [1.0, 1.0, 0.0]):
        expected = stats.bernoulli(1 / (1 + np.exp(-logits.numpy()[0, 0]))).logpmf(x).sum()
        assert likelihood.log_prob(torch.tensor([x], dtype=torch.float64), logits).item() == pytest.approx(expected)
    assert likelihood.log_prob(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[[-1e4, 1e4, 1e4]]])).item() == -1e4
    drawn = likelihood.sample(logits.expand(1, 20_000, 3), noise())[0].mean(0)
    expected_mean = likelihood.mean(logits)[0, 0]
    assert ((drawn - expected_mean).abs() < 4 * (expected_mean * (1 - expected_mean) / 20_000).sqrt()).all()


@pytest.mark.parametrize("levels", [17, 256])
def test_grey_pixels_begin_at_the_training_mean(levels: int) -> None:
    mean = np.linspace(0.2, 0.8, 5) * (levels - 1)
    likelihood = DiscretizedLogistic(mean, levels)
    found = likelihood.mean(torch.from_numpy(likelihood.initial_bias())[None, None])[0, 0].numpy()
    # The ends are cut off, which pulls inwards a little.
    np.testing.assert_allclose(found, mean, atol=0.03 * (levels - 1))


@pytest.mark.parametrize("noise_std", [None, 0.3])
def test_a_gaussian_is_the_normal_of_torch_with_one_scale(noise_std: float | None) -> None:
    likelihood = Gaussian(np.array([1.0, -2.0, 0.5]), noise_std).double()
    likelihood.start_at(0.7)
    std = noise_std or 0.7
    generator = torch.Generator().manual_seed(0)
    x, at = (torch.randn(*shape, 3, generator=generator, dtype=torch.float64) for shape in ((4,), (5, 4)))
    law = torch.distributions.Normal(at, std)
    torch.testing.assert_close(likelihood.log_prob(x, at), law.log_prob(x).sum(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(likelihood.mean(at), at) and likelihood.initial_bias().tolist() == [1.0, -2.0, 0.5]
    drawn = (likelihood.sample(at[:1, :1].expand(20_000, 1, 3), noise())[:, 0] - at[0, 0]).detach()
    assert stats.kstest(drawn.flatten().numpy() / std, "norm").pvalue > 1e-3
    # A learned scale is a parameter, whose optimum is the root mean squared error.
    parameters = list(likelihood.parameters())
    assert len(parameters) == (noise_std is None)
    if parameters:
        error = (x - at).square().mean().sqrt()
        likelihood.start_at(float(error))
        (slope,) = torch.autograd.grad(likelihood.log_prob(x, at).sum(), parameters)
        assert abs(slope) < 1e-5


def test_a_gaussian_scale_is_learned_kept_or_refused(generator: torch.Generator) -> None:
    sizes: dict[str, list] = {"latent_sizes": [2], "hidden_sizes": [[3]]}
    for noise_std, names in ((None, ["generative.observation.likelihood.log_std"]), (0.5, [])):
        model = GaussianMLP(**sizes, likelihood="gaussian", noise_std=noise_std)
        built = model.build((4,), np.full(4, 3.0), generator, None, std=2.0)
        assert [name for name, _ in built.named_parameters() if "std" in name] == names
        scale = built.state_dict()["generative.observation.likelihood.log_std"].exp().item()
        assert scale == pytest.approx(2.0 if names else 0.5)
        # E[x|h] begins at the training mean for any h, up to the head's random weights.
        assert built.generative.observation.head.bias.tolist() == [3.0] * 4
        other = model.build((4,), np.zeros(4), generator)
        other.load_state_dict(built.state_dict())
    for wrong in (0.0, -1.0, 1e9):
        with pytest.raises(ValueError, match=r"^noise_std must be null, or with likelihood=gaussian from 1e-06"):
            GaussianMLP(**sizes, likelihood="gaussian", noise_std=wrong)
    with pytest.raises(
        ValueError, match=r"^noise_std must be null, or with likelihood=gaussian .* with likelihood=bernoulli$"
    ):
        GaussianMLP(**sizes, noise_std=0.5)


def test_which_likelihood() -> None:
    assert isinstance(make_likelihood("bernoulli", np.zeros(2), 256), Bernoulli)
    grey = make_likelihood("discretized_logistic", np.zeros(2), 17)
    assert isinstance(grey, DiscretizedLogistic)
    assert grey.white == 16
    with pytest.raises(ValueError, match=r"^levels must be known for likelihood=discretized_logistic, got none$"):
        make_likelihood("discretized_logistic", np.zeros(2), None)
    with pytest.raises(ValueError, match=r"^levels must be >= 2, got 1$"):
        DiscretizedLogistic(np.zeros(2), 1)
