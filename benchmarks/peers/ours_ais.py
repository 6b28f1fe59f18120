"""Annealed importance sampling by iwae-cli's transitions, with as many chains and leapfrog steps as ``estimator=ais``.

Paths begin at q, which is nearer: on a model of one pass over MNIST, 100 temperatures from q were 0.1 nats low and
from the prior 1.0. A path costs what it must: its step sizes come from a short path, and no coarser ones are annealed
before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.peers.ours import Ours
from benchmarks.worker import serve
from iwae_cli.evaluation.ais import AIS
from iwae_cli.evaluation.ais.paths import Paths

TUNED = 100
"""Temperatures of the path that step sizes come from."""


class Annealing(Ours):
    """See the module."""

    def log_px(self, images: np.ndarray, effort: int, seed: int) -> np.ndarray:
        ais, x = AIS(), torch.from_numpy(images)
        key, rows = (seed, "ais", "test"), self.evaluation.rows
        paths = Paths(self.model(), ais.chains, ais.leapfrog_steps, "inference", key, rows=rows)
        steps = paths.share(lambda some: paths.tune(some, paths.observed(x, some), TUNED), len(x))

        def forward(some: Sequence[int]) -> np.ndarray:
            return paths.forward(some, paths.observed(x, some), effort, steps[:, some])

        return np.asarray(paths.share(forward, len(x))[0])


if __name__ == "__main__":
    serve(Annealing)
