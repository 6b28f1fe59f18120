"""Write the data and weights that every program begins from.

``python -m benchmarks.prepare FOLDER NAME:MODEL:STEPS,NAME:MODEL:STEPS OVERRIDE ...``
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, Job
from benchmarks.peers.ours import Ours


def prepare(files: Path, wanted: list[tuple[str, str, int]], overrides: tuple[str, ...]) -> None:
    """Write ``data.npz``, and for every (name, model, steps) the ``initial`` weights and ``name``, trained at 20x5."""
    for trained, model, steps in wanted:
        # So few steps take no more time than compiling one does.
        ours = Ours(Job(Case("train", model, 5, 20), files, (*overrides, "device.compile=off"), whole=0.0))
        data = ours.session.data
        if not (files / "data.npz").exists():
            assert data.levels is not None
            splits = {name: data.evaluation_split(name, 0).x.numpy() for name in ("validation", "test")}
            facts = {"white": data.levels - 1, "protocol": data.protocol}
            np.savez(files / "data.npz", train=data.train.numpy(), **splits, **facts)  # type: ignore[arg-type]
        done = 0

        def tick(units: int, steps: int = steps) -> bool:
            nonlocal done
            done += units
            return done < steps

        for name in ("initial", trained):
            if name == trained:
                ours.train(tick)
            weights = {key: value.numpy() for key, value in ours.session.model.state_dict().items()}
            np.savez(files / f"{name}_{model}.npz", **weights)


if __name__ == "__main__":
    parts = [part.split(":") for part in sys.argv[2].split(",")]
    prepare(Path(sys.argv[1]), [(name, model, int(steps)) for name, model, steps in parts], tuple(sys.argv[3:]))
