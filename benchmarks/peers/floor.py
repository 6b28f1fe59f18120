"""What no program here can beat by much: the matrix products of the work alone, by torch, into fixed buffers.

Options: ``tanh+exp`` adds the elementwise functions that cannot be left out, tanh of every hidden unit and one exp for
every pixel and sample; ``bf16`` makes the products those of bfloat16. Nothing is trained and no number means anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import SIZES, Job
from benchmarks.peers.torch_networks import PIXELS
from benchmarks.worker import Tick, by_parts, serve

ROWS = (250, 500, 1000, 2000)
"""Samples at once in evaluation, to choose from."""


class Floor:
    """See the module."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.case.cores)
        torch.set_grad_enabled(False)
        self.case = job.case
        self.dtype = torch.bfloat16 if "bf16" in job.overrides else torch.float32
        self.elementwise = "tanh+exp" in job.overrides
        self.settings = f"torch {torch.__version__}"
        self._forward: Callable[[], None] | None = None
        self._rows = 0

    def train(self, tick: Tick) -> None:
        """Products forward, with respect to the weights, and with respect to the inputs of all but the first layer."""
        batch, rows = self.case.batch, self.case.batch * self.case.k
        work = self._work(batch, rows, backward=True)
        while True:
            work()
            if not tick(1):
                return

    def check(self) -> tuple[None, None]:
        """Nothing to check."""
        return None, None

    def evaluate(self, images: np.ndarray, tick: Tick) -> None:
        by_parts(self, images, self.case, tick)

    def nll(self, images: np.ndarray, k: int) -> float:
        """Products forward for k samples of every image."""
        if self._forward is None:
            self._choose(k)
        assert self._forward is not None
        for _ in range(round(len(images) * k / self._rows)):
            self._forward()
        return 0.0

    def _choose(self, k: int) -> None:
        seconds = {}
        for rows in {min(rows, k) for rows in ROWS}:
            work = self._work(0, rows, backward=False)
            work()
            before = time.perf_counter()
            for _ in range(max(1, 20_000 // rows)):
                work()
            seconds[rows] = (time.perf_counter() - before) / max(1, 20_000 // rows) / rows
        self._rows = min(seconds, key=seconds.__getitem__)
        self._forward = self._work(0, self._rows, backward=False)
        self.settings += f", {self._rows} rows at once"

    def _work(self, batch: int, rows: int, *, backward: bool) -> Callable[[], None]:
        products: list[tuple[Tensor, Tensor, Tensor, str]] = []
        for number, inputs, outputs, function in _layers(self.case.model, batch, rows):
            if not number:
                continue
            x = torch.randn(number, inputs).to(self.dtype)
            w = (torch.randn(inputs, outputs) / math.sqrt(inputs)).to(self.dtype)
            y = torch.empty(number, outputs, dtype=self.dtype)
            products.append((x, w, y, function if self.elementwise else ""))
            if backward:
                products.append((x.T, y, torch.empty_like(w), ""))
                if (number, inputs) != (batch, PIXELS):
                    products.append((y, w.T, torch.empty_like(x), ""))

        def work() -> None:
            for a, b, out, function in products:
                torch.mm(a, b, out=out)
                if function == "tanh":
                    out.tanh_()
                elif function == "exp":
                    out.exp_()

        return work


def _layers(model: str, batch: int, rows: int) -> list[tuple[int, int, int, str]]:
    """Rows, inputs, outputs of every product, and the function after it; both heads of a Gaussian are one product."""
    latent, hidden = SIZES[model]
    layers: list[tuple[int, int, int, str]] = []

    def network(number: int, sizes: list[int], head: int, after: str) -> None:
        layers.extend((number, i, o, "tanh") for i, o in pairwise(sizes))
        layers.append((number, sizes[-1], head, after))

    for level, (below, above) in enumerate(pairwise([PIXELS, *latent])):
        network(rows if level else batch, [below, *hidden[level]], 2 * above, "")
    for (below, above), sizes in zip(pairwise(latent), hidden[1:], strict=True):
        network(rows, [above, *sizes[::-1]], 2 * below, "")
    network(rows, [latent[0], *hidden[0][::-1]], PIXELS, "exp")
    return layers


if __name__ == "__main__":
    serve(Floor)
