"""Write the data and weights that every program begins from.

``python -m benchmarks.prepare FOLDER MODEL,MODEL STEPS OVERRIDE ...``
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, Job
from benchmarks.peers.ours import Ours


def prepare(files: Path, models: list[str], overrides: tuple[str, ...], steps: int) -> None:
    """Write ``data.npz``, and for every model its weights before and after so many ``steps`` of 20 images at k = 5."""
    for model in models:
        # So few steps take less time than compiling one.
        ours = Ours(Job(Case("train", model, 5, 20), files, (*overrides, "device.compile=off"), whole=0.0))
        data = ours.session.data
        if model == models[0]:
            assert data.levels is not None
            splits = {name: data.evaluation_split(name, 0).x.numpy() for name in ("validation", "test")}
            facts = {"white": data.levels - 1, "protocol": data.protocol}
            np.savez(files / "data.npz", train=data.train.numpy(), **splits, **facts)  # type: ignore[arg-type]
        done = 0

        def tick(units: int) -> bool:
            nonlocal done
            done += units
            return done < steps

        for name in ("initial", "weights"):
            if name == "weights":
                ours.train(tick)
            weights = {key: value.numpy() for key, value in ours.session.model.state_dict().items()}
            np.savez(files / f"{name}_{model}.npz", **weights)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), sys.argv[2].split(","), tuple(sys.argv[4:]), int(sys.argv[3]))
