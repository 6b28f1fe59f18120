"""Paths of annealed chains from the start distribution to the posterior and back, for batches of images."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Kind, Noise, numpy_generator
from iwae_cli.core.numerics import effective_sample_size, log_mean_exp
from iwae_cli.core.progress import Progress
from iwae_cli.evaluation.ais.moves import Chains, Scores, gibbs_sweep, hamiltonian_move
from iwae_cli.evaluation.workers import map_batches, processes
from iwae_cli.models.base import LatentVariableModel

SIGMOID_SPAN = 4.0  # the schedule is the sigmoid from -4 to 4: small steps at both ends, where the path bends most
TARGET_ACCEPTANCE = 0.65  # near the optimum of HMC in many dimensions (Neal 2011, arXiv 1206.1901)
FIRST_STEP = 0.1  # where step sizes begin
ADAPTATION = 0.2  # they move by exp(0.2 (acceptance - 0.65))
WARM_UP = 30  # times before the path begins
GROUP = 10  # images whose chains are moved together on a processor

Start = Literal["prior", "inference"]


class ImageNoise(Noise):
    """Noise from a stream for each image, keyed by (*key, image), read in the order of the calls.

    The numbers of an image depend on no other image, so that no result depends on how images are batched. They are
    drawn in float32 for every ``dtype``.
    """

    def __init__(
        self, key: Sequence[int | str], images: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._streams = [numpy_generator(*key, int(image)) for image in images]
        self._dtype = dtype
        self._device = device

    def _draw(self, kind: Kind, layer: int, k: int, batch: int, size: int) -> Tensor:
        if batch % len(self._streams):
            raise ValueError(f"batch must be the {len(self._streams)} images of this noise, got {batch}")
        # Draws of p(h) have all chains of all images in one batch.
        each = k * batch // len(self._streams)
        method = "standard_normal" if kind == "normal" else "random"
        draws = [getattr(stream, method)((each, size), dtype=np.float32) for stream in self._streams]
        drawn = torch.from_numpy(np.stack(draws, axis=1)).reshape(k, batch, size)
        return drawn.to(device=self._device, dtype=self._dtype)


def sigmoid_schedule(temperatures: int) -> list[float]:
    """Return inverse temperatures 0 = beta_0 < ... < beta_T = 1, equally spaced on the axis of a sigmoid."""
    points = [1 / (1 + math.exp(SIGMOID_SPAN * (1 - 2 * t / temperatures))) for t in range(temperatures + 1)]
    betas = [(point - points[0]) / (points[-1] - points[0]) for point in points]
    return [0.0, *betas[1:-1], 1.0]


class Tally:
    """Count of transitions, each of all chains of one image, over all threads; ``planned`` are certain to come."""

    def __init__(self, progress: Progress | None = None, planned: int = 0) -> None:
        self._progress = progress
        self._planned = planned
        self._done = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Tally], tuple[()]]:
        # Other processes display nothing.
        return Tally, ()

    def start(self, title: str, more: int = 0) -> None:
        """Begin the next part of the work, with ``more`` transitions than were planned."""
        with self._lock:
            self._planned += more
            if self._progress is not None:
                self._progress.change(title, self._planned)

    def add(self, images: int) -> None:
        """Count one transition of some images."""
        with self._lock:
            # Other processes are assumed to be as far as this one.
            self._done = min(self._planned, self._done + images * processes())
            if self._progress is not None:
                self._progress.update(self._done)


@dataclass(frozen=True)
class Paths:
    """Annealing of batches of images along f_beta = start^(1-beta) p(x, h)^beta."""

    model: LatentVariableModel  # in evaluation mode, on its device
    chains: int  # per image
    leapfrog_steps: int  # of every HMC transition
    start: Start  # distribution at beta = 0
    key: tuple[int | str, ...]  # of the noise, to which the purpose and the image are added
    rows: int = 2000  # bound on chains x images computed at once by one worker
    workers: int | None = None  # threads that share the images; None is one per core on a CPU, one on another device
    check: Callable[[], None] = lambda: None  # called by every worker whenever p is evaluated; may raise to stop
    tally: Tally = field(default_factory=Tally)  # counts the transitions

    def share(self, work: Callable[[Sequence[int]], np.ndarray], n: int) -> np.ndarray:
        """Return ``work`` of ``n`` images by threads, joined along its last axis."""

        def with_gradients(images: Sequence[int]) -> np.ndarray:
            # Tensors made in inference mode cannot be differentiated.
            with torch.inference_mode(False), torch.no_grad():
                return work(images)

        device, batch = self._parameter.device, max(1, self.rows // self.chains)
        if device.type == "cpu":
            # Few, for all workers to have some; and as many for any number of workers, since the shape of a product may
            # change its last bits, by which a path takes another turn.
            batch = min(batch, GROUP)
        return np.concatenate(map_batches(with_gradients, n, batch, self.workers, device), axis=1)

    @property
    def _parameter(self) -> Tensor:
        return next(self.model.parameters())

    def observed(self, x: Tensor, images: Sequence[int]) -> Float[Tensor, "batch pixels"]:
        """Return the observations of some images."""
        return x[images[0] : images[-1] + 1].to(self._parameter)

    def noise(self, purpose: str, images: Sequence[int]) -> ImageNoise:
        """Return the noise of some images for one purpose."""
        return ImageNoise((*self.key, purpose), images, self._parameter.dtype, self._parameter.device)

    def tune(
        self, images: Sequence[int], x: Float[Tensor, "batch pixels"], temperatures: int
    ) -> Float64[np.ndarray, "temperatures n"]:
        """Return step sizes for every temperature and image, from chains that are not used for anything else."""
        log_step = np.full(len(images), math.log(FIRST_STEP))
        steps = np.empty((temperatures, len(images)))
        if not self.model.inference.reparameterized:
            return np.ones_like(steps)
        noise = self.noise("tune", images)
        scores = self._scores(x)
        chains = self._begin(scores, x, noise)
        betas = sigmoid_schedule(temperatures)[1:]
        for t, beta in enumerate([betas[0]] * WARM_UP + betas):
            step = torch.from_numpy(np.exp(log_step)).to(self._parameter)
            chains, probability = hamiltonian_move(scores, chains, beta, step, self.leapfrog_steps, noise)
            self.tally.add(len(images))
            log_step += ADAPTATION * (probability.mean(0).double().cpu().numpy() - TARGET_ACCEPTANCE)
            if t >= WARM_UP:
                steps[t - WARM_UP] = np.exp(log_step)
        return steps

    def forward(
        self, images: Sequence[int], x: Float[Tensor, "batch pixels"], temperatures: int, steps: np.ndarray
    ) -> Float64[np.ndarray, "3 n"]:
        """Return log p(x), effective sample size and acceptance of paths from the start to the posterior."""
        noise = self.noise(f"forward {temperatures}", images)
        scores = self._scores(x)
        chains = self._begin(scores, x, noise)
        log_w, acceptance = self._walk(scores, chains, temperatures, steps, noise, backwards=False)
        return torch.stack([log_mean_exp(log_w), effective_sample_size(log_w), acceptance]).cpu().numpy()

    def backward(
        self, images: Sequence[int], x: Float[Tensor, "batch pixels"], h: Latents, temperatures: int, steps: np.ndarray
    ) -> Float64[np.ndarray, " n"]:
        """Return log p(x) from paths back to the start that begin at ``h``, an exact draw of the posterior.

        E[1/w] = 1/p(x), hence the signs.
        """
        noise = self.noise(f"backward {temperatures}", images)
        scores = self._scores(x)
        latents = tuple(layer.expand(self.chains, -1, -1) for layer in h)
        log_w, _ = self._walk(scores, Chains(latents, *scores(latents)), temperatures, steps, noise, backwards=True)
        return -log_mean_exp(-log_w).cpu().numpy()

    def _walk(
        self, scores: Scores, chains: Chains, temperatures: int, steps: np.ndarray, noise: Noise, backwards: bool
    ) -> tuple[Float64[Tensor, "chains batch"], Float64[Tensor, " batch"]]:
        """Return log-weights and acceptance of the chains along the path; ``backwards`` is the exact reversal."""
        betas = sigmoid_schedule(temperatures)
        log_w = torch.zeros_like(chains.base, dtype=torch.float64)
        accepted = torch.zeros_like(log_w[0])
        for t in range(temperatures, 0, -1) if backwards else range(1, temperatures + 1):
            width = betas[t] - betas[t - 1]
            if not backwards:
                log_w += width * chains.gap.double()
            # Finer paths use each step size of the coarsest one several times.
            step = torch.from_numpy(steps[(t - 1) * len(steps) // temperatures]).to(self._parameter)
            if self.model.inference.reparameterized:
                chains, probability = hamiltonian_move(scores, chains, betas[t], step, self.leapfrog_steps, noise)
            else:
                chains, probability = gibbs_sweep(scores, chains, betas[t], noise, backwards)
            self.tally.add(chains.base.shape[1])
            accepted += probability.double().mean(0)
            if backwards:
                log_w += width * chains.gap.double()
        return log_w, accepted / temperatures

    def _scores(self, x: Float[Tensor, "batch pixels"]) -> Scores:
        generative, inference = self.model.generative, self.model.inference

        def from_prior(latents: Latents) -> tuple[Tensor, Tensor]:
            self.check()
            return generative.log_prior(latents), generative.log_likelihood(x, latents)

        def from_inference(latents: Latents) -> tuple[Tensor, Tensor]:
            self.check()
            log_q = inference(x, latents)
            return log_q, generative(x, latents) - log_q

        return from_prior if self.start == "prior" else from_inference

    def _begin(self, scores: Scores, x: Float[Tensor, "batch pixels"], noise: Noise) -> Chains:
        chains, batch = self.chains, x.shape[0]
        if self.start == "prior":
            drawn, _ = self.model.generative.sample(chains * batch, noise)
            latents = tuple(h.reshape(chains, batch, -1) for h in drawn)
        else:
            latents, _ = self.model.inference.sample(x, chains, noise)
        return Chains(latents, *scores(latents))
