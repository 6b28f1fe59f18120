"""A step that several processes share is the step of one: the same noise, the same gradient, the same bounds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.models.architectures.discrete import SigmoidBeliefNetwork
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.objectives.elbo import ELBO
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.objectives.jvi import JVI
from iwae_cli.objectives.miwae import MIWAE
from iwae_cli.objectives.rws import RWS
from iwae_cli.objectives.tvo import TVO
from iwae_cli.objectives.vimco import VIMCO
from iwae_cli.training.crew import MeanOfShares, ShareOfNoise, pays, share
from iwae_cli.training.steps.plain import train_step
from iwae_cli.training.steps.roulette import roulette_step

TWO, BITS = GaussianMLP([3, 2], [[5], [4]]), SigmoidBeliefNetwork([4, 3])
CASES: dict[str, tuple[Architecture, Objective]] = {
    "ELBO": (TWO, ELBO(2)),
    "IWAE": (TWO, IWAE(3)),
    "IWAE DReG": (TWO, IWAE(3, "dreg")),
    "MIWAE": (TWO, MIWAE(2, 3)),
    "TVO": (TWO, TVO(3)),
    "JVI": (TWO, JVI(3)),
    "RWS, wake and sleep": (BITS, RWS(3, "both")),
    "VIMCO": (BITS, VIMCO(3)),
}
N, PIXELS = 7, 6


class Alone:
    """A process of a crew whose others are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.given: list[torch.Tensor] = []

    def sum(self, tensor: torch.Tensor) -> None:
        self.given.append(tensor.clone())

    def attend(self) -> None:
        raise AssertionError

    def dismiss(self) -> None:
        raise AssertionError


def built(architecture: Architecture) -> LatentVariableModel:
    generator = torch.Generator().manual_seed(3)
    return architecture.build((PIXELS,), np.full(PIXELS, 0.3), generator).double()


def noise() -> GeneratorNoise:
    return GeneratorNoise(torch.Generator().manual_seed(5), torch.float64)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [*CASES, "roulette"])
def test_the_shares_make_the_step_of_one(name: str, size: int) -> None:
    """What each gives to the sum, added up, against the gradient of the whole minibatch at once."""
    architecture, objective = (TWO, IWAE(3)) if name == "roulette" else CASES[name]
    x = (torch.rand(N, PIXELS) < 0.5).double()
    alone = built(architecture)

    def step(model: LatentVariableModel, hook: MeanOfShares | None, own: slice) -> torch.Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if hook is not None:
            optimizer.register_step_pre_hook(hook)
        drawn = noise() if hook is None else ShareOfNoise(noise(), N, own)
        if name == "roulette":
            return roulette_step(model, IWAE(3), optimizer, x[own], drawn, 0.4)
        return train_step(model, objective, optimizer, x[own], drawn)

    bounds = step(alone, None, slice(0, N))
    whole = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None])
    total, found = torch.zeros_like(whole), []
    for rank in range(size):
        crew = Alone(rank, size)
        hook, own = MeanOfShares(crew), share(N, crew)
        hook.weight = (own.stop - own.start) / N
        found.append(step(copy.deepcopy(built(architecture)), hook, own))
        total += crew.given[0]
    torch.testing.assert_close(torch.cat(found), bounds, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-12)
    assert whole.abs().max() > 1e-3


@pytest.mark.parametrize("n", [2, 3, 7, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_image_is_in_one_share(n: int, size: int) -> None:
    shares = [share(n, Alone(rank, size)) for rank in range(size)]
    if n < size:
        assert all(own == slice(0, n) for own in shares), "too few to share: every process does all"
    else:
        assert [i for own in shares for i in range(n)[own]] == list(range(n))
        sizes = [own.stop - own.start for own in shares]
        assert max(sizes) - min(sizes) <= 1


def test_noise_is_for_the_images_of_the_share() -> None:
    drawn = ShareOfNoise(noise(), N, slice(2, 5))
    with pytest.raises(ValueError, match="batch must be the 3 images of this share, got 7"):
        drawn.normal(0, 2, N, 1)
    assert torch.equal(ShareOfNoise(noise(), N, slice(2, 5)).uniform(0, 2, 3, 4), noise().uniform(0, 2, N, 4)[:, 2:5])


def test_it_is_shared_where_the_products_outweigh_the_exchange() -> None:
    parameters = 538_000  # of the paper's one layer
    assert not pays(1, 100 * 50, parameters), "one process has nobody to share with"
    assert not pays(2, 20, parameters) and not pays(2, 20 * 5, parameters)
    assert pays(2, 20 * 50, parameters) and pays(2, 100 * 50, parameters)
