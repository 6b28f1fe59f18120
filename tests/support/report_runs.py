"""Write run folders with chosen numbers, which have all else from a real one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from small_runs import TINY, finished, read_json

from iwae_cli.cli.compose import plan
from iwae_cli.record.identity import RECIPE, evaluation_name

Command = Callable[..., tuple[int, str, str]]
"""iwae-report: from its arguments to exit code, standard output and standard error."""
MODELS = {"one_layer": ([50], [[200, 200]]), "two_layer": ([100, 50], [[200, 200], [100, 100]])}


@cache
def burda() -> dict[str, Any]:
    overrides = ["experiment=burda", "data=mnist", "data_dir=data", "evaluation.splits=[test]"]
    return plan(overrides, False, None).jobs[0].config


@cache
def made_by_a_run() -> dict[str, Any]:
    """Return the ``result.json`` of a real run, some images of which have refined values."""
    with TemporaryDirectory() as place:
        return read_json(finished(Path(place), *TINY, "evaluation.refine=10") / "result.json")


def config(model: str = "one_layer", objective: str = "iwae", k: int = 50, seed: int = 0, **changed: Any) -> Any:
    """Return a resolved configuration; ``changed`` has dotted keys with ``__`` for dots."""
    made = deepcopy(burda())
    made["model"]["latent_sizes"], made["model"]["hidden_sizes"] = MODELS[model]
    made["objective"]["k"], made["seed"] = k, seed
    made["objective"]["_target_"] = f"iwae_cli.objectives.{objective}.{objective.upper()}"
    if objective == "elbo":
        made["objective"]["analytic_kl"] = False
    for key, value in changed.items():
        *groups, last = key.split("__")
        node = made
        for group in groups:
            node = node[group]
        node[last] = value
    return made


def write(
    output_dir: Path,
    settings: dict[str, Any],
    log_px: np.ndarray,
    *,
    data: str = "mnist",
    names: tuple[str, str] = ("one_layer", "iwae"),
    choices: tuple[str, str] = ("burda", "burda"),
    units: list[int] | None = None,
    images: str = "one binarization",
    arrays: bool = True,
    refined: np.ndarray | None = None,
    no_gap: str | None = None,
    recipe: int = RECIPE,
) -> Path:
    """Write a finished run whose test images have these log p(x); return its folder.

    ``names`` were chosen for model and objective, ``choices`` for optimizer and schedule; ``refined`` are log p(x) of
    the first images, or of all, by refined proposals of ``recipe``, and ``no_gap`` is the reason why there are none.
    """
    digest = hashlib.sha256(json.dumps([data, settings, names], sort_keys=True).encode()).hexdigest()[:8]
    identity = f"{data}-{names[0]}-{names[1]}-k{settings['objective'].get('k', 1)}-seed{settings['seed']}-{digest}"
    folder = output_dir / identity
    folder.mkdir(parents=True)
    asked = settings["evaluation"]
    refine = 0 if refined is None else "all" if len(refined) == len(log_px) else len(refined)
    made = {**asked, "splits": ["test"], "refine": refine}
    evaluation = evaluation_name({"evaluation": made, "device": settings["device"]}, recipe)
    targets = [settings[group]["_target_"] for group in ("data", "model", "objective", "optimizer", "schedule")]
    outside = [t.rpartition(".")[0].replace(".", "/") for t in targets if not t.startswith(("iwae_cli.", "torch."))]
    n, nll, k = len(log_px), -float(np.mean(log_px)), asked["k"]
    steps = 3280 * -(-59600 // settings["batch_size"])
    result = deepcopy(made_by_a_run())
    split = result["test"]
    by_refined = {key: split.pop(key) for key in ("gap_q", "gap_q_stderr", "refined")}["refined"]
    split |= {
        **{"nll": nll, "k": k, "n": n, "stderr_mc": 0.004, "bias_mc": -0.002},
        "stderr_images": float(np.std(log_px, ddof=1) / np.sqrt(n)),
        "bounds": {"1": -nll - 3.0, "50": -nll - 0.5, str(k): -nll},
        **{"ess_median": min(800.0, k), "ess_min": min(40.0, k), "ess_share_below_10": 0.0},
        **{"khat_share_above_0.7": 0.0, "top_weight_share_above_0.5": 0.0},
    }
    held, reasons = {"log_px": np.asarray(log_px, dtype=np.float64), "ess": np.full(n, 800.0)}, {}
    if no_gap is not None:
        split |= {"gap_q": None, "gap_q_stderr": None}
        reasons["test.gap_q"] = no_gap
    if refined is not None:
        gap, mean = refined - log_px[: len(refined)], -float(np.mean(refined))
        split |= {"gap_q": float(gap.mean()), "gap_q_stderr": float(gap.std(ddof=1)) / len(gap) ** 0.5}
        split["refined"] = by_refined | {
            **{key: split[key] for key in ("k", "ess_median", "ess_min", "khat_share_above_0.7")},
            **{"n": len(refined), "nll": mean, "stderr_mc": 0.001, "bias_mc": -0.0005},
            "stderr_images": float(np.std(refined, ddof=1)) / len(refined) ** 0.5,
            "bounds": {"1": -mean - 1.0, str(k): -mean},
        }
        split |= {"nll_refined": mean} if len(refined) == n else {}
        held["refined_log_px"] = np.asarray(refined, dtype=np.float64)
    result["dataset"] |= {
        "name": data,
        "protocol": "binarized",
        "sizes": {"train": 59600, "validation": 400, "test": n},
    }
    result["dataset"]["evaluation_sha256"] = {"test": hashlib.sha256(images.encode()).hexdigest()}
    result |= {
        **{"identity": identity, "seed": settings["seed"], "weights": asked["weights"], "test": split},
        **{"model": {"name": names[0]}, "objective": {"name": names[1]}},
        **{"optimizer": {"name": choices[0]}, "schedule": {"name": choices[1]}},
        **{"trained": settings["train"], "init_from": settings["init_from"], "epochs": 3280, "steps": steps},
        **{"draws": 1_000_000, "versions": {}, "git": None, "code": None, "reasons": reasons, "arrays": sorted(held)},
        "sources": {f"{module}.py": "0" * 16 for module in outside},
        "evaluation": {
            **{key: asked[key] for key in ("seed", "binarization_seed", "k")},
            **{"name": evaluation, "step": steps, "precision": settings["device"]["precision"]},
        },
        **{"active_units": units, "active_units_authors_rule": units, "rows": [], "notes": []},
        "seconds": {"train": 1.0, "evaluate": 1.0},
    }
    status = {"status": "finished", "step": steps, "pid": 1, "host": "elsewhere", "error": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "status.json").write_text(json.dumps(status))
    rows = [{"step": s, "pass": s, "train/bound": -100.0 + s, "validation/bound": -99.0 + s} for s in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if arrays:
        np.savez(folder / "log_likelihood.npz", **held)  # type: ignore[arg-type]
    return folder


def evaluate(folder: Path, settings: dict[str, Any], log_px: np.ndarray, name: str, **options: Any) -> None:
    """Evaluate a run once more, with the settings and options of ``write``."""
    made = write(folder.parent / f"{name} of {folder.name}", settings, log_px, **options)
    (folder / "evaluations").mkdir(exist_ok=True)
    made.rename(folder / "evaluations" / name)
    (folder.parent / f"{name} of {folder.name}").rmdir()


def write_estimate(
    folder: Path, name: str, numbers: dict[str, Any], rows: list[list[str]], steps: int | None = None
) -> None:
    """Write the evaluation of a run by another estimator than L_k."""
    place = folder / "evaluations" / f"{name}-last-01234567"
    place.mkdir(parents=True)
    top = json.loads((folder / "result.json").read_text())
    facts = {key: value for key, value in top.items() if key not in ("test", "active_units", "arrays")}
    steps = top["steps"] if steps is None else steps
    evaluation = {"name": place.name, "step": steps, "precision": "float32"}
    facts |= {"steps": steps, "evaluation": evaluation, "estimator": {"name": name}}
    (place / "result.json").write_text(json.dumps({**facts, **numbers, "rows": rows}))


def change(path: Path, **values: Any) -> None:
    """Change top-level values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def values(nll: float, n: int = 40, seed: int = 0) -> np.ndarray:
    """Return per-image log p(x) whose mean is -``nll`` up to rounding."""
    spread = np.random.default_rng(seed).normal(size=n)
    return -nll + spread - spread.mean()
