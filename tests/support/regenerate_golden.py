"""Rewrite golden.json after an intended change of numbers: ``python tests/support/regenerate_golden.py``.

Commit it with that change and the reason. Never edit the numbers by hand.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("golden.json")
SHORT = (
    *("schedule=constant", "schedule.passes=2", "batch_size=50", "optimizer=burda", "device=cpu", "logger=disabled"),
    *("validation=smoke", "evaluation=smoke", "evaluation.k=50", "evaluation.splits=[test]", "evaluation.refine=0"),
)
RUNS = {
    "one layer, IWAE-5": ("model=one_layer", "objective=iwae", "objective.k=5"),
    "one layer, ELBO": ("model=one_layer", "objective=elbo", "objective.k=1"),
    "one layer, ELBO with analytic KL": ("model=one_layer", "objective=elbo", "objective.analytic_kl=true"),
    "one layer, IWAE-5 DReG": ("model=one_layer", "objective=iwae", "objective.k=5", "objective.gradient=dreg"),
    "two layers, IWAE-5": ("model=two_layer", "objective=iwae", "objective.k=5"),
    "two layers, IWAE-5 DReG": ("model=two_layer", "objective=iwae", "objective.k=5", "objective.gradient=dreg"),
    "two layers, VAE-5 STL": ("model=two_layer", "objective=elbo", "objective.k=5", "objective.gradient=stl"),
}


def numbers(name: str, output_dir: Path) -> dict[str, float]:
    """Return the last training bound, the last validation bound and the test NLL of run ``name``, all in nats."""
    from small_runs import finished, read_json

    folder = finished(output_dir, *SHORT, *RUNS[name])
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    test: dict[str, Any] = read_json(folder / "result.json")["test"]
    return {"train/bound": last["train/bound"], "validation/bound": last["validation/bound"], "nll": test["nll"]}


def main() -> None:
    """Run all and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: numbers(name, Path(folder)) for name in RUNS}
    FILE.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{len(found)} runs written to {FILE}")


if __name__ == "__main__":
    sys.path[:0] = [str(FILE.parents[2])]
    main()
