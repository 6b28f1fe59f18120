"""Published test NLLs, and the runs they apply to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from iwae_cli.report.reader import Run, Score, class_name

K = 5000
BURDA = "Burda et al. 2016, arXiv 1509.00519"
RAINFORTH = "Rainforth et al. 2018, arXiv 1802.04537"
ROEDER = "Roeder et al. 2017, arXiv 1703.09194"
RECALLED = "*"  # behind a number that is quoted from memory of the paper


@final
@dataclass(frozen=True)
class Published:
    """The value of a paper for one cell."""

    nll: float  # NLL_5000 on the test split, nats
    units: tuple[int, ...] | None  # active units, nearest to x first, quoted from memory; None where it gives none
    source: str
    nll_recalled: bool  # whether the NLL is quoted from memory too

    def __str__(self) -> str:
        nll = f"{self.nll:.2f}{RECALLED * self.nll_recalled}"
        return nll if self.units is None else f"{nll} / {'+'.join(map(str, self.units))}{RECALLED}"


Key = tuple[str, int, str, int]  # data, stochastic layers, objective, k


def _cells(data: str, table: str, *, recalled: bool) -> dict[Key, Published]:
    """Parse lines of ``layers objective``, then ``NLL/units`` or ``NLL`` at k = 1, 5, 50; ``-`` where there is none."""
    cells = {}
    for line in table.strip().splitlines():
        layers, objective, *values = line.split()
        for k, value in zip((1, 5, 50), values, strict=True):
            nll, _, units = value.partition("/")
            if nll != "-":
                known = tuple(map(int, units.split("+"))) if units else None
                cells[data, int(layers), objective, k] = Published(float(nll), known, BURDA, recalled)
    return cells


MNIST = """
1 elbo 86.76/19   86.47/20   86.35/20
1 iwae 86.76/19   85.54/22   84.78/25
2 elbo 85.33/16+5 85.01/17+5 84.78/17+5
2 iwae 85.33/16+5 83.89/21+5 82.90/26+7
"""
OMNIGLOT = """
1 elbo 108.11/28   107.62/28   107.80/28
1 iwae 108.11/28   106.12/34   104.67/41
2 elbo 107.58/28+4 106.31/30+5 106.30/30+5
2 iwae 107.56/30+5 104.79/38+6 103.38/44+7
"""
TABLE: dict[Key, Published] = {
    **_cells("mnist", MNIST, recalled=False),
    **_cells("omniglot", OMNIGLOT, recalled=True),
    # Table 2: a run with one objective continued with the other.
    ("mnist", 1, "elbo1>iwae", 50): Published(84.88, (22,), BURDA, True),
    ("mnist", 1, "iwae50>elbo", 1): Published(86.02, (23,), BURDA, True),
    # The binarization of Larochelle and Murray.
    **_cells("mnist_fixed", "1 iwae 88.71 87.63 87.10", recalled=False),
    **_cells("mnist_fixed", "1 elbo - 88.83 89.05\n2 iwae - - 85.32", recalled=True),
    ("mnist", 1, "miwae8", 8): Published(84.97, None, RAINFORTH, False),
    ("mnist", 1, "piwae8", 8): Published(84.46, None, RAINFORTH, False),
    ("mnist", 1, "ciwae0.05", 64): Published(84.57, None, RAINFORTH, False),
    ("mnist", 1, "iwae", 64): Published(84.52, None, RAINFORTH, True),
    ("mnist", 1, "elbo-stl", 1): Published(86.40, None, ROEDER, True),
}

NETWORKS = {("[50]", "[[200, 200]]"): 1, ("[100, 50]", "[[200, 200], [100, 100]]"): 2}
TRAINING = {
    "optimizer": "Adam",
    "optimizer.lr": 1e-3,
    "optimizer.betas": "[0.9, 0.999]",
    "optimizer.eps": 1e-4,
    "optimizer.weight_decay": 0.0,
    "schedule": "Burda",
    "schedule.stages": 8,
    "schedule.patience": None,
    "batch_size": 20,
    "training.backward": "all",
    "training.kl_warmup": 0,
    "training.clip": None,
    "training.ema": None,
    "device.precision": "float32",
}
"""Training of the papers by dotted key; the class for optimizer and schedule."""
MODEL = {
    "model.likelihood": "bernoulli",
    "model.activation": "tanh",
    "model.prior": "standard",
    "model.posterior": "diagonal",
    "train": "all",
    "data.path": None,
}
"""Choices besides the sizes of the networks."""
SWAP = {"optimizer.lr": 1e-4, "schedule": "Constant", "schedule.passes": 2187, "with_optimizer": True}
"""Second stage of Table 2, where it differs."""


def published(run: Run, score: Score, split: str) -> Published | None:
    """Return the published value for this data, binarization, networks, objective, k, and L_5000 on the test split."""
    if split != "test" or score.k != K or score.weights != "last" or score.keys["evaluation.images"] is not None:
        return None
    keys = run.keys
    layers = NETWORKS.get((keys.get("model.latent_sizes", ""), keys.get("model.hidden_sizes", "")))
    plain = all(keys.get(key) == value for key, value in MODEL.items())
    # The class, since a user may give any name to a choice.
    if layers is None or not plain or class_name(keys["model._target_"]) != "GaussianMLP":
        return None
    return TABLE.get((run.dataset, layers, _trained(run), int(keys.get("objective.k", 0))))


def deviations(run: Run) -> list[str]:
    """Return how the training differs from the paper's, such as ``schedule.stages = 3 (paper: 8)``."""
    wanted = TRAINING
    classes = {group: class_name(run.keys[f"{group}._target_"]) for group in ("optimizer", "schedule")}
    keys, found = {**run.keys, **classes}, []
    if keys["init_from"]:
        wanted = {key: value for key, value in TRAINING.items() if key != "schedule.stages"} | SWAP
    if keys.get("schedule") != wanted["schedule"]:
        # One line instead of one for every argument of another schedule.
        wanted = {key: value for key, value in wanted.items() if not key.startswith("schedule")}
        found = [f"{run.result['epochs']:,} passes on schedule {run.keys['schedule']}"]
    wanted = wanted | {key: False for key in ("optimizer.amsgrad", "optimizer.maximize") if key in keys}
    return found + [
        f"{key} = {keys.get(key)} (paper: {value})" for key, value in wanted.items() if keys.get(key) != value
    ]


def _trained(run: Run) -> str:
    """Return the objective as named in ``TABLE``."""
    keys = run.keys
    name = class_name(keys["objective._target_"]).lower()
    if name in ("miwae", "piwae"):
        name += str(keys["objective.m"])
    if name == "ciwae":
        name += str(keys["objective.beta"])
    if keys.get("objective.gradient", "total") != "total":
        name += f"-{keys['objective.gradient']}"
    if keys.get("objective.analytic_kl"):
        name += "-analytic"
    if keys["init_from"] is None:
        return name
    # Folder names say what a run was, <data>-<model>-<objective>-k<k>; in 0.2.0 the model was called one_layer.
    first = keys["init_from"].replace("mnist-one_layer-", "mnist-gaussian_mlp_50-")
    known = {"mnist-gaussian_mlp_50-elbo-k1": "elbo1", "mnist-gaussian_mlp_50-iwae-k50": "iwae50"}
    return f"{known.get(first, 'other')}>{name}"
