"""The minibatches of a training with their noise, as a function of (seed, step) alone."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.noise import GeneratorNoise, Noise, derive, generator
from iwae_cli.data.base import Data


@final
class Minibatches:
    """``x, noise = minibatches[step]``: images in the order of their pass, binarized, and the noise of this step.

    Order, binarization and noise are derived from (seed, stream, pass or step), so that a training resumes at any step.
    Use ``noise`` before the next minibatch is made: both draw from one generator.

    Args:
        data: its training split is used.
        batch_size: images in each step; the last minibatch of a pass holds what is left.
        seed: of the run.
        device, dtype: of ``x`` and of the noise.

    Attributes:
        per_pass: steps in one pass over the training split.
        shape: (rows, pixels) of every minibatch but perhaps the last of a pass.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        n, pixels = data.train.shape
        self.per_pass = math.ceil(n / batch_size)
        self.shape = min(batch_size, n), pixels
        self.data = data
        self._batch_size = batch_size
        self._seed = seed
        self._dtype = dtype
        self._images = data.train.to(device)
        self._random = torch.Generator(device)
        self._noise = GeneratorNoise(self._random, dtype)
        self._pass_index = -1
        self._order = torch.empty(0)

    def __getitem__(self, step: int) -> tuple[Float[Tensor, "batch pixels"], Noise]:
        """Return the images of step 0, 1, ..., counted over all passes, and the noise source for their samples."""
        pass_index, batch_index = divmod(step, self.per_pass)
        if pass_index != self._pass_index:
            order = generator("cpu", self._seed, "order", pass_index)
            self._order = torch.randperm(len(self._images), generator=order).to(self._images.device)
            self._pass_index = pass_index
        self._random.manual_seed(derive(self._seed, "step", step) >> 65)
        chosen = self._order[batch_index * self._batch_size : (batch_index + 1) * self._batch_size]
        x = self.data.batch(self._images.index_select(0, chosen), self._random).to(self._dtype)
        return x, self._noise
