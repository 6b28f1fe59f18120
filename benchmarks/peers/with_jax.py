"""JAX (XLA), as strong as it could be written: whole stretches of training in one compiled scan with donated buffers.

Data stay where the computation is; random numbers by the rbg generator; pixels binarized by comparing 16-bit integers;
the encoder runs once an image. In evaluation, several shapes of (images at once, samples at once) are timed and the
quickest is used. With ``bf16`` among the options the evaluation's products are of bfloat16 with float32 sums.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from benchmarks.cases import BETAS, CHECK_STEPS, EPS, LEARNING_RATE, Job
from benchmarks.worker import Tick, by_parts, serve

Weights = dict[str, Array]

SHAPES = ((1, 500), (1, 1000), (3, 250), (8, 100), (24, 50))
"""Images and samples at once, to choose from."""


class Jax:
    """See the module."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings = f"jax {jax.__version__}"
        self.weights = self._initial()
        self.train_split = jnp.asarray(job.data("train"))
        self.white = float(job.data("white"))
        self.dtype = jnp.bfloat16 if "bf16" in job.overrides else jnp.float32
        self.optimizer = optax.adam(LEARNING_RATE, *BETAS, eps=EPS)
        self._shapes: dict[int, tuple[int, int]] = {}

    def train(self, tick: Tick) -> None:
        """Scans of about a third of a second, over a fresh permutation of the images in every pass."""
        case, n = self.job.case, len(self.train_split)
        # No longer than a pass: without MNIST there are 1,297 images.
        steps = max(2, min(500, 20_000 // (case.batch * case.k + 100), n // case.batch))
        scan = jax.jit(self._scan, donate_argnums=0)
        state = (self._initial(), self.optimizer.init(self.weights), jax.random.key(self.job.seed, impl="rbg"))
        random = np.random.default_rng(self.job.seed)
        while True:
            order = random.permutation(n)[: n // (steps * case.batch) * steps * case.batch]
            for part in jnp.asarray(order.reshape(-1, steps, case.batch)):
                state, bounds = scan(state, self.train_split, part)
                bounds.block_until_ready()
                self.weights = state[0]
                if not tick(steps):
                    return

    def check(self) -> tuple[list[float], dict[str, np.ndarray]]:
        """The body of the scan with images and noise that are given."""
        weights = self._initial()
        memory, bounds = self.optimizer.init(weights), []
        update = jax.jit(self._update)
        for step in range(CHECK_STEPS):
            x, draws = self.job.check_batch(step)
            weights, memory, bound = update(weights, memory, x, draws)
            bounds.append(float(bound))
        return bounds, {name: _ours(name, value) for name, value in weights.items()}

    def evaluate(self, images: np.ndarray, tick: Tick) -> None:
        by_parts(self, images, self.job.case, tick)

    def nll(self, images: np.ndarray, k: int) -> float:
        """Sums of weights over chunks of samples in one compiled program for every batch of images."""
        x = jnp.asarray(images, jnp.float32)
        if len(x) not in self._shapes:
            self._shapes[len(x)] = self._quickest(x, k)
            at_once, samples = self._shapes[len(x)]
            self.settings += f", of {len(x)} images {at_once} x {samples} samples at once"
        return -float(self._log_px(self.weights, x, self._shapes[len(x)], k).mean())

    def _initial(self) -> Weights:
        return {name: jnp.asarray(_transposed(value)) for name, value in self.job.weights().items()}

    def _scan(self, state: Any, images: Array, order: Array) -> tuple[Any, Array]:
        sizes = _latent_sizes(state[0])

        def body(state: Any, chosen: Array) -> tuple[Any, Array]:
            weights, memory, key = state
            key, of_pixels, *of_layers = jax.random.split(key, 2 + len(sizes))
            threshold = (images[chosen] * jnp.float32(65536 / self.white)).astype(jnp.uint32)
            x = jax.random.bits(of_pixels, threshold.shape, jnp.uint16) < threshold
            shape = (self.job.case.k, len(chosen))
            draws = [jax.random.normal(k, (*shape, size)) for k, size in zip(of_layers, sizes, strict=True)]
            weights, memory, bound = self._update(weights, memory, x.astype(jnp.float32), draws)
            return (weights, memory, key), bound

        return jax.lax.scan(body, state, order)

    def _update(self, weights: Weights, memory: Any, x: Array, draws: list[Array]) -> tuple[Weights, Any, Array]:
        def loss(weights: Weights) -> Array:
            log_w = _log_weights(weights, x, draws)
            return -(jax.nn.logsumexp(log_w, axis=0) - math.log(len(log_w))).mean()

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, memory = self.optimizer.update(gradient, memory)
        return optax.apply_updates(weights, updates), memory, -value

    @partial(jax.jit, static_argnums=(0, 3, 4))
    def _log_px(self, weights: Weights, x: Array, shape: tuple[int, int], k: int) -> Array:
        at_once, samples = shape
        sizes = _latent_sizes(weights)
        key = jax.random.key(0, impl="rbg")

        def of_images(part: tuple[Array, Array]) -> Array:
            images, index = part
            first = _conditional(weights, "inference.layers.0", images, self.dtype)

            def more(total: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
                keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, index), chunk), len(sizes))
                draws = [jax.random.normal(k, (samples, at_once, size)) for k, size in zip(keys, sizes, strict=True)]
                log_w = _log_weights(weights, images, draws, first, self.dtype)
                log_w = jnp.where((chunk * samples + jnp.arange(samples) < k)[:, None], log_w, -jnp.inf)
                top, scaled = total
                new = jnp.maximum(top, log_w.max(0))
                return (new, scaled * jnp.exp(top - new) + jnp.exp(log_w - new).sum(0)), None

            start = (jnp.full(at_once, -1e30), jnp.zeros(at_once))
            (top, scaled), _ = jax.lax.scan(more, start, jnp.arange(-(-k // samples)))
            return top + jnp.log(scaled) - math.log(k)

        n = len(x) // at_once
        return jax.lax.map(of_images, (x.reshape(n, at_once, -1), jnp.arange(n))).reshape(-1)

    def _quickest(self, x: Array, k: int) -> tuple[int, int]:
        """The best of ``SHAPES`` on these very images, with fewer samples of each."""
        seconds, k = {}, min(k, 1000)
        for shape in ((images, min(samples, k)) for images, samples in SHAPES if len(x) % images == 0):
            self._log_px(self.weights, x, shape, k).block_until_ready()
            taken = []
            for _ in range(2):
                before = time.perf_counter()
                self._log_px(self.weights, x, shape, k).block_until_ready()
                taken.append(time.perf_counter() - before)
            seconds[shape] = min(taken)
        return min(seconds, key=seconds.__getitem__)


def _transposed(value: np.ndarray) -> np.ndarray:
    """A matrix as XLA multiplies it: (inputs, outputs)."""
    return np.ascontiguousarray(value.T)


def _ours(name: str, value: Array) -> np.ndarray:
    return np.asarray(value).T


def _latent_sizes(weights: Weights) -> list[int]:
    layers = sum(name.startswith("inference.layers.") and name.endswith(".loc.bias") for name in weights)
    return [len(weights[f"inference.layers.{layer}.loc.bias"]) for layer in range(layers)]


def _linear(weights: Weights, name: str, x: Array, dtype: Any) -> Array:
    product = jnp.matmul(x.astype(dtype), weights[f"{name}.weight"].astype(dtype), preferred_element_type=jnp.float32)
    return product + weights[f"{name}.bias"]


def _tanh_layers(weights: Weights, name: str, x: Array, dtype: Any) -> Array:
    for index in range(0, 2 * len(weights), 2):
        if f"{name}.{index}.weight" not in weights:
            break
        x = jnp.tanh(_linear(weights, f"{name}.{index}", x, dtype))
    return x


def _conditional(weights: Weights, name: str, given: Array, dtype: Any) -> tuple[Array, Array]:
    features = _tanh_layers(weights, f"{name}.body", given, dtype)
    return _linear(weights, f"{name}.loc", features, dtype), _linear(weights, f"{name}.log_scale", features, dtype)


def _normal(h: Array, loc: Array, log_scale: Array) -> Array:
    """Without -d/2 log 2 pi, which cancels between p and q."""
    return (-0.5 * jnp.square((h - loc) * jnp.exp(-log_scale)) - log_scale).sum(-1)


def _log_weights(
    weights: Weights,
    x: Array,
    draws: list[Array],
    first: tuple[Array, Array] | None = None,
    dtype: Any = jnp.float32,
) -> Array:
    """Log w, (k, batch), of given images (batch, pixels) and normal draws (k, batch, d_l)."""
    log_w, given, latents = jnp.float32(0), x, []
    for layer, draw in enumerate(draws):
        known = first if layer == 0 else None
        loc, log_scale = known or _conditional(weights, f"inference.layers.{layer}", given, dtype)
        given = loc + jnp.exp(log_scale) * draw
        log_w += (0.5 * jnp.square(draw) + log_scale).sum(-1)
        latents.append(given)
    log_w += -0.5 * jnp.square(latents[-1]).sum(-1)
    for layer in range(len(draws) - 1):
        below = _conditional(weights, f"generative.layers.{layer}", latents[layer + 1], dtype)
        log_w += _normal(latents[layer], *below)
    features = _tanh_layers(weights, "generative.observation.body", latents[0], dtype)
    logits = _linear(weights, "generative.observation.head", features, dtype)
    softplus = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return log_w + (x * logits - softplus).sum(-1)


if __name__ == "__main__":
    serve(Jax)
