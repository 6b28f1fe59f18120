"""Pyro: RenyiELBO(alpha=0) with vectorized particles, stepped by its SVI.

Its loss sums over the images, so eps of Adam is multiplied by the batch size, which makes the steps those of the
others. Validation of arguments and shapes is off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.optim import Adam
from torch import Tensor

from benchmarks.cases import BETAS, CHECK_STEPS, EPS, LEARNING_RATE, SIZES, Job
from benchmarks.peers.torch_networks import Generative, Inference, binarized
from benchmarks.worker import Tick, by_parts, serve

IMAGES = (1, 4)
"""Images at once in evaluation, to choose from."""


class Pyro:
    """See the module."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.case.cores)
        pyro.enable_validation(False)
        self.job = job
        self.settings = f"pyro {pyro.__version__}"
        self.generative, self.inference = Generative(job.case.model), Inference(job.case.model)
        self.images, self.white = torch.from_numpy(job.data("train")), float(job.data("white"))
        self._at_once = 0

    def model(self, x: Tensor) -> None:
        """p(x, h)."""
        pyro.module("generative", self.generative)
        size = SIZES[self.job.case.model][0][-1]
        with pyro.plate("images", len(x)):
            h = pyro.sample(f"h{len(self.inference.layers)}", dist.Normal(x.new_zeros(size), 1.0).to_event(1))
            for level in range(len(self.generative.layers), 0, -1):
                loc, log_scale = self.generative.layers[level - 1](h)
                h = pyro.sample(f"h{level}", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.generative.observation(h)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(h|x)."""
        pyro.module("inference", self.inference)
        with pyro.plate("images", len(x)):
            given = x
            for level, layer in enumerate(self.inference.layers, start=1):
                loc, log_scale = layer(given)
                given = pyro.sample(f"h{level}", dist.Normal(loc, log_scale.exp()).to_event(1))

    def train(self, tick: Tick) -> None:
        """``SVI.step`` on batches of a fresh permutation, all in memory."""
        svi, batch = self._svi(), self.job.case.batch
        while True:
            for chosen in torch.randperm(len(self.images)).split(batch):
                svi.step(binarized(self.images[chosen], self.white))
                if not tick(1):
                    return

    def check(self) -> tuple[list[float], dict[str, np.ndarray]]:
        """Steps with noise that is put where torch's Normal draws its own."""
        svi, bounds = self._svi(), []
        normal: Any = torch.distributions.normal
        own = normal._standard_normal
        for step in range(CHECK_STEPS):
            x, draws = self.job.check_batch(step)
            given: Iterator[np.ndarray] = iter(draws)

            def standard_normal(shape: Any, dtype: Any, device: Any, given: Iterator[np.ndarray] = given) -> Tensor:
                return torch.from_numpy(next(given)).view(shape)

            normal._standard_normal = standard_normal
            bounds.append(-svi.step(torch.from_numpy(x)) / len(x))
        normal._standard_normal = own
        networks = {"generative": self.generative, "inference": self.inference}
        return bounds, {
            f"{name}.{key}": value.numpy().copy()
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        }

    def evaluate(self, images: np.ndarray, tick: Tick) -> None:
        by_parts(self, images, self.job.case, tick)

    def nll(self, images: np.ndarray, k: int) -> float:
        """``RenyiELBO.loss`` with k particles."""
        x = torch.from_numpy(images).float()
        if not self._at_once:
            self._load_weights()
            loss = RenyiELBO(alpha=0, num_particles=min(k, 5000), vectorize_particles=True, max_plate_nesting=1).loss
            seconds = {}
            for size in IMAGES:
                before = time.perf_counter()
                loss(self.model, self.guide, x[:size])
                seconds[size] = (time.perf_counter() - before) / size
            self._at_once = min(seconds, key=seconds.__getitem__)
            self.settings += f", {self._at_once} images at once"
        loss = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1).loss
        return sum(float(loss(self.model, self.guide, part)) for part in x.split(self._at_once)) / len(x)

    def _svi(self) -> SVI:
        pyro.clear_param_store()
        self._load_weights()
        k, batch = self.job.case.k, self.job.case.batch
        adam = Adam({"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS * batch})
        loss = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
        return SVI(self.model, self.guide, adam, loss=loss)

    def _load_weights(self) -> None:
        for prefix, network in (("generative.", self.generative), ("inference.", self.inference)):
            weights = {n.removeprefix(prefix): w for n, w in self.job.weights().items() if n.startswith(prefix)}
            network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})


if __name__ == "__main__":
    serve(Pyro)
