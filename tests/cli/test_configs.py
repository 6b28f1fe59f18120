"""Every yaml of conf/ trains: composed, constructed, and one real step taken, at its own sizes.

Data sets that need files get small ones, written here in their layout.
"""

from __future__ import annotations

import hashlib
import json
import signal
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from small_runs import read_json, run, run_folders

from iwae_cli.cli.compose import plan
from iwae_cli.cli.help import choices, conf_folder
from iwae_cli.config.build import construct
from iwae_cli.core.device import available
from iwae_cli.data import caltech101
from iwae_cli.data.base import SPLITS
from iwae_cli.data.mnist import KMNIST, MNIST, FashionMNIST
from iwae_cli.data.mnist_fixed import Amat, FixedMNIST
from iwae_cli.data.omniglot import Omniglot
from iwae_cli.report.reader import flatten
from iwae_cli.runs.runner import Runner

CHOICES = choices([conf_folder()])
CYCLED = ("data", "optimizer", "schedule", "logger", "device")
"""Groups whose choices take their step together with one objective or another."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files of every data set that needs some, where ``data_dir`` is ``files``."""
    root, random = tmp_path / "files", np.random.default_rng(0)
    for kind in (MNIST, FashionMNIST, KMNIST):
        for attribute, value in (("sizes", (460, 20)), ("md5", {})):
            monkeypatch.setattr(kind, attribute, value)
        (root / kind.folder / "raw").mkdir(parents=True)
        for part, n in (("train", 460), ("t10k", 20)):
            images = random.integers(0, 256, (n, 784), dtype=np.uint8).tobytes()
            path = root / kind.folder / "raw" / f"{part}-images-idx3-ubyte"
            path.write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + images)
    (root / "BinaryMNIST").mkdir()
    small = {}
    for split, (name, _, _) in FixedMNIST.files.items():
        text = "".join(" ".join(row) + "\n" for row in random.integers(0, 2, (30, 784)).astype(str)).encode()
        (root / "BinaryMNIST" / name).write_bytes(text)
        small[split] = Amat(name, 30, hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(FixedMNIST, "files", small)
    (root / "OMNIGLOT").mkdir()
    savemat(root / "OMNIGLOT" / "chardata.mat", {"data": random.random((784, 40)), "testdata": random.random((784, 9))})
    content = (root / "OMNIGLOT" / "chardata.mat").read_bytes()
    monkeypatch.setattr(Omniglot, "md5", hashlib.md5(content).hexdigest())
    silhouettes = {key: random.integers(0, 2, (30, 784), dtype=np.uint8) for key in caltech101.SPLITS}
    (root / "Caltech101Silhouettes").mkdir()
    savemat(root / "Caltech101Silhouettes" / "caltech101_silhouettes_28_split1.mat", silhouettes)
    np.savez(root / "own.npz", **{split: random.integers(0, 2, (30, 8, 8)) for split in SPLITS})
    for split in SPLITS:
        (root / "own" / split).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / "own" / split / f"{i}.png")
    return root


OWN = {"file": ("data.path=files/own.npz",), "folder": ("data.path=files/own",)}
"""What data sets need that have no default."""


def one_step(*overrides: str) -> None:
    """The command, stopped by a signal after its first step: it saved finite weights that are not the initial ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "on_step", lambda self, step: signal.raise_signal(signal.SIGTERM))
        # To compile a step takes half a minute, and that it may be compiled is tested with the steps.
        code, _, err = run(*overrides, "device.compile=off", "output_dir=out", "data_dir=files")
    assert code == 143, err
    (folder,) = run_folders(Path("out"))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and read_json(folder / "status.json")["status"] == "interrupted"
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    moments = [value["exp_avg"] for value in state["optimizer"]["state"].values()]
    assert moments and any(moment.abs().max() > 0 for moment in moments)


def composed(*overrides: str, group: str) -> Any:
    """The object of a group."""
    return construct(plan(overrides, False, None).jobs[0].config, [group])[group]


@pytest.mark.parametrize("row", range(len(CHOICES["objective"])))
def test_every_objective_takes_a_step_and_with_it_every_choice_of_other_groups(row: int, files: Path) -> None:
    chosen = {"objective": CHOICES["objective"][row]}
    for group in CYCLED:
        names = [name for name in CHOICES[group] if group != "device" or name in ("auto", *available())]
        names = [name for name in names if name != "tensorboard" or find_spec("tensorboard")]
        chosen[group] = names[row % len(names)]
    if composed(f"data={chosen['data']}", group="data").observation == "real":
        chosen["model"] = "linear_gaussian"
    one_step(*(f"{group}={name}" for group, name in chosen.items()), *OWN.get(chosen["data"], ()))


def test_every_choice_has_a_row_and_every_group_a_test() -> None:
    assert max(len(CHOICES[group]) for group in CYCLED) <= len(CHOICES["objective"])
    groups = {"objective", "model", *CYCLED, "validation", "evaluation", "experiment", "estimator"}
    assert {path.parent.name for path in conf_folder().glob("*/*.yaml")} == groups
    assert {group for group in CHOICES if "/" not in group} == groups


@pytest.mark.parametrize("name", CHOICES["model"])
def test_every_model_takes_a_step(name: str) -> None:
    model = composed(f"model={name}", group="model")
    data = ["data=linear_gaussian"] if model.observation == "real" else []
    one_step(f"model={name}", *data, *(["objective=vimco"] if model.discrete else []), "logger=disabled")


@pytest.mark.parametrize("name", CHOICES["experiment"])
def test_a_preset_takes_a_step(name: str, files: Path) -> None:
    if "init_from=" in (conf_folder() / "experiment" / f"{name}.yaml").read_text():
        code, _, err = run(f"experiment={name}", "output_dir=out")
        assert code == 2 and "init_from" in err and len(err.strip().splitlines()) == 1
        return
    if name == "sweeps/search" and not find_spec("optuna"):
        code, _, err = run(f"experiment={name}", "output_dir=out")
        assert code == 2 and "iwae-cli[optuna]" in err
        return
    # The small files have 460 images for training and validation.
    few = ["data.validation=60"] if name == "vampprior" else []
    one_step(f"experiment={name}", "logger=disabled", *few)


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        (  # Burda et al. 2016, section 5, and their code
            "burda",
            {
                **{"schedule.stages": 8, "batch_size": 20, "optimizer.lr": 1e-3, "optimizer.betas": [0.9, 0.999]},
                **{"optimizer.eps": 1e-4, "optimizer.weight_decay": 0.0, "evaluation.k": 5000},
                "evaluation.weights": "last",
            },
        ),
        (  # Tomczak and Welling 2018, section 4.1, and the settings of their code
            "vampprior",
            {
                **{"data.validation": 10_000, "batch_size": 100, "model.latent_sizes": [40], "optimizer.lr": 5e-4},
                **{"model.hidden_sizes": [[300, 300]], "model.activation": "gated", "model.prior": "vamp"},
                **{"model.prior_components": 500, "training.kl_warmup": 100, "schedule.patience": 50},
                "objective._target_": "iwae_cli.objectives.elbo.ELBO",
            },
        ),
        (  # van den Berg et al. 2018, section 6.1, and the settings of their code
            "sylvester",
            {
                **{"batch_size": 100, "model.latent_sizes": [64], "optimizer.lr": 5e-4, "optimizer.eps": 1e-7},
                **{"optimizer._target_": "torch.optim.Adamax", "model.activation": "gated"},
                **{"training.kl_warmup": 100, "schedule.patience": 100},
                "objective._target_": "iwae_cli.objectives.elbo.ELBO",
            },
        ),
    ],
)
def test_a_preset_has_the_published_settings(preset: str, published: dict[str, Any]) -> None:
    keys = flatten(plan([f"experiment={preset}"], False, None).jobs[0].config)
    assert {key: keys[key] for key in published} == {
        key: json.dumps(value) if isinstance(value, list) else value for key, value in published.items()
    }


def test_the_smoke_run_is_one_for_a_ci(tmp_path: Path) -> None:
    """The preset as it is, but for the record of W&B: on the embedded digits, with both splits evaluated."""
    code, out, err = run("experiment=smoke", "logger=disabled", "output_dir=out")
    assert code == 0, err
    (folder,) = run_folders(Path("out"))
    result = read_json(folder / "result.json")
    assert (result["epochs"], result["test"]["k"], result["dataset"]["name"]) == (3, 500, "digits")
    # 64 pixels at their mean brightness cost about 32 nats; a step in a wrong direction would cost more.
    assert 20 < result["test"]["nll"] < 27 and "NLL_500" in out
