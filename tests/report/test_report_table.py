from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from report_runs import change, config, values, write

import iwae_cli.cli.compose  # noqa: F401  it registers what the yaml files refer to
from iwae_cli.core.errors import UserError
from iwae_cli.record.summary import measured
from iwae_cli.report.cells import Table, tables
from iwae_cli.report.published import TABLE
from iwae_cli.report.reader import read
from iwae_cli.report.selection import comparable

CONF = Path(__file__).resolve().parents[2] / "conf"


def table(place: Path, rows: list[str] | None = None, columns: list[str] | None = None) -> Table:
    scored, left_out = comparable(read([place]).runs, "test")
    assert not left_out
    (made,) = tables(scored, rows, columns)
    return made


def test_mean_and_standard_error_over_seeds(tmp_path: Path) -> None:
    nlls = [84.7, 85.0, 85.2]
    for seed, nll in enumerate(nlls):
        write(tmp_path, config(seed=seed), values(nll), units=[24 + seed])
    (cell,) = table(tmp_path).cells
    assert cell.nll == pytest.approx(statistics.mean(nlls))
    # sd of 84.7, 85.0, 85.2 about 84.9667 with 2 in the denominator, over sqrt(3)
    assert cell.stderr == pytest.approx((0.126667 / 2 / 3) ** 0.5, abs=1e-6)
    assert cell.units == (25.0,)
    assert cell.bounds == pytest.approx({1: -cell.nll - 3, 50: -cell.nll - 0.5, 5000: -cell.nll})


def test_one_seed_each_has_its_error_over_images(tmp_path: Path) -> None:
    """As soon as a cell has several seeds, errors are over these, and a lone seed has none."""
    log_px = values(85.0)
    write(tmp_path, config(), log_px)
    write(tmp_path, config(objective="elbo"), values(86.0), names=("one_layer", "elbo"))
    error = float(np.std(log_px, ddof=1)) / len(log_px) ** 0.5
    made = table(tmp_path)
    assert made.body[0][-len(made.names)] == measured(85.0, error)
    assert "one seed each, ± over images" in made.notes_below[0]
    write(tmp_path, config(objective="elbo", seed=1), values(86.4), names=("one_layer", "elbo"))
    made = table(tmp_path)
    texts = [made.fields(cell)[0].text for cell in made.cells]
    assert texts == ["86.20 ± 0.20", "85.00"] and "± over images" not in made.notes_below[0]


def test_active_units_of_all_and_a_note_where_q_has_collapsed(tmp_path: Path) -> None:
    """Collapsed in every seed of a cell; without sizes the counts alone."""
    for seed in range(2):
        write(tmp_path, config(seed=seed), values(85.0), units=[25 * seed])
        write(tmp_path, config("two_layer", seed=seed), values(83.0), names=("two_layer", "iwae"), units=[26 + seed, 0])
    own = config(model__sizes=[9])
    del own["model"]["latent_sizes"]
    write(tmp_path, own, values(87.0), names=("own", "iwae"), units=[6, 2])
    made = table(tmp_path, ["model"], [])
    assert [cell.units_of_sizes for cell in made.cells] == ["12.5 of 50", "6 + 2", "26.5 of 100 + 0 of 50"]
    (note,) = [note for note in made.notes_below if "collapsed" in note]
    assert "no active unit: two_layer in h_2; " in note


def test_rows_and_columns_by_any_key(tmp_path: Path) -> None:
    for model in ("one_layer", "two_layer"):
        for k in (50, 5, 1):
            write(tmp_path, config(model, k=k), values(80 + k), names=(model, "iwae"))
    made = table(tmp_path, ["objective.k"], ["model"])
    assert made.row_labels == [("1",), ("5",), ("50",)], "numbers by size"
    assert made.column_labels == [("one_layer",), ("two_layer",)]
    assert dict(made.grid)["5",][1].nll == pytest.approx(85)
    made = table(tmp_path, ["model.latent_sizes"], ["objective.k"])
    assert made.row_labels == [("[100, 50]",), ("[50]",)]


def test_only_seeds_are_averaged(tmp_path: Path) -> None:
    """Asked for objective.k alone: what else differs is added to the rows, with a note."""
    for lr in (0.001, 0.0003):
        for seed in range(2):
            write(tmp_path, config(seed=seed, optimizer__lr=lr), values(85 + lr * 100))
    write(tmp_path, config("two_layer"), values(82.9), names=("two_layer", "iwae"))
    made = table(tmp_path, ["objective.k"])
    assert made.rows == ("objective.k", "model", "optimizer.lr")
    assert sorted(len(cell.runs) for cell in made.cells) == [1, 2, 2]
    assert len(made.notes) == 2 and "optimizer.lr" in made.notes[1]


def test_what_cannot_change_the_weights_makes_no_other_cell(tmp_path: Path) -> None:
    """Paths, logger, device, and the cadence of validation where the last weights are evaluated."""
    others = {"logger__mode": "online"}, {"device__kind": "cuda"}, {"data__data_dir": "x"}, {"validation__k": 5}
    for seed, changed in enumerate(({}, *others)):
        write(tmp_path, config(seed=seed, **changed), values(85.0))
    (cell,) = table(tmp_path).cells
    assert len(cell.runs) == 5


def test_one_seed_twice_is_not_two_seeds(tmp_path: Path) -> None:
    """Validation decides nothing about the last weights, so both runs are one training."""
    for every in (5, 9):
        write(tmp_path, config(validation__every=every), values(85.0))
    scored, (left,) = comparable(read([tmp_path]).runs, "test")
    assert len(scored) == 1 and left.state == "repeated" and scored[0].run.path.name in left.why


def test_second_stages_of_different_first_ones_are_never_mixed(tmp_path: Path) -> None:
    """The names of their ancestors differ by seed and hash alone, as those of two seeds do."""
    for seed, rate in enumerate((1e-3, 1e-4)):
        first = tmp_path / "first" / f"mnist-one_layer-elbo-k1-seed0-0123456{seed}"
        first.mkdir(parents=True)
        (first / "config.yaml").write_text(yaml.safe_dump(config(optimizer__lr=rate)))
        write(tmp_path / "second", config(seed=seed, init_from=str(first)), values(85.0 + seed))
    assert [len(cell.runs) for cell in table(tmp_path / "second").cells] == [1, 1]
    for seed in range(2):
        first_of_seed = f"outputs/mnist-one_layer-elbo-k1-seed{seed}-0123456{seed}"
        write(tmp_path / "seeds", config(seed=seed, init_from=first_of_seed), values(85.0))
    assert len(table(tmp_path / "seeds").cells) == 1


def test_groups_have_the_names_that_were_typed(tmp_path: Path) -> None:
    smoke: dict[str, Any] = {"schedule": {"_target_": "iwae_cli.training.schedule.Constant", "passes": 3}}
    write(tmp_path, config(), values(85.0))
    write(tmp_path, config(seed=1, **smoke), values(90.0), choices=("burda_code", "smoke"))
    assert table(tmp_path, ["schedule"], ["optimizer"]).row_labels == [("burda",), ("smoke",)]
    made = table(tmp_path, ["model"], ["objective"])
    assert made.rows == ("model", "schedule") and {cell.row[1] for cell in made.cells} == {"burda", "smoke"}
    with pytest.raises(UserError, match="no run has the key evaluation; did you mean"):
        table(tmp_path, ["evaluation"])


def test_two_names_of_the_same_settings_are_one_cell(tmp_path: Path) -> None:
    """schedule=smoke is schedule=constant schedule.passes=3; and results of old do not say what was chosen."""
    write(tmp_path, config(seed=0), values(85.0), choices=("burda", "burda"))
    write(tmp_path, config(seed=1), values(85.0), choices=("mine", "long"))
    old = write(tmp_path, config(seed=2), values(85.0))
    result = json.loads((old / "result.json").read_text())
    kept = {key: value for key, value in result.items() if key not in ("optimizer", "schedule")}
    (old / "result.json").write_text(json.dumps(kept))
    (cell,) = table(tmp_path).cells
    assert [s.run.keys["schedule"] for s in cell.runs] == ["burda", "long", "Burda"] and cell.deviations == ()


def test_one_name_of_two_classes_is_two_cells(tmp_path: Path) -> None:
    """A choice of the user's own may have any name, and the arguments of another."""
    write(tmp_path, config(seed=0), values(85.0))
    for group in ("objective", "schedule"):
        mine = config(seed=1)
        mine[group]["_target_"] = "mine.Mine"
        write(tmp_path / group, mine, values(85.0))
    made = table(tmp_path)
    assert {"objective._target_", "schedule._target_"} <= set(made.rows) and len(made.cells) == 3


def test_gradients_have_cells_of_their_own_under_any_name(tmp_path: Path) -> None:
    """objective=dreg is IWAE's class with gradient=dreg; neither is ever shown as, or averaged with, plain IWAE."""
    for seed, (name, gradient) in enumerate((("iwae", "total"), ("iwae", "dreg"), ("dreg", "dreg"), ("stl", "stl"))):
        write(tmp_path, config(seed=seed, objective__gradient=gradient), values(85.0), names=("one_layer", name))
    made = table(tmp_path, ["objective"])
    assert made.rows == ("objective", "objective.gradient")
    labels = [("dreg", "dreg"), ("iwae", "dreg"), ("iwae", "total"), ("stl", "stl")]
    assert [(cell.row, len(cell.runs)) for cell in made.cells] == [(label, 1) for label in labels]
    assert [cell.published is not None for cell in made.cells] == [False, False, True, False]
    made = table(tmp_path, ["objective.gradient"])
    assert all(len(cell.runs) == 1 for cell in made.cells) and len(made.cells) == 4


def test_a_roulette_has_a_cell_of_its_own(tmp_path: Path) -> None:
    """Without one its other keys decide nothing, and older runs, which have none of them, were trained by all."""
    target = "iwae_cli.training.settings.Training"
    for seed, training in enumerate((None, ("all", 0.01), ("all", 0.05), ("roulette", 0.01), ("roulette", 0.01))):
        written = config(seed=seed)
        if training is not None:
            written["training"] = {"_target_": target, "backward": training[0], "tau": training[1]}
        write(tmp_path, written, values(85.0 + seed))
    made = table(tmp_path)
    assert made.rows[-1] == "training.backward"
    assert {cell.row[-1]: len(cell.runs) for cell in made.cells} == {"all": 3, "roulette": 2}


def test_data_sets_are_never_mixed(tmp_path: Path) -> None:
    for data in ("mnist", "omniglot"):
        write(tmp_path, config(), values(85.0), data=data, images=data)
    scored, _ = comparable(read([tmp_path]).runs, "test")
    assert [made.title for made in tables(scored)] == ["mnist, test, k = 5000", "omniglot, test, k = 5000"]
    (made,) = tables(scored, None, ["data", "objective"])
    assert made.column_labels == [("mnist", "iwae"), ("omniglot", "iwae")]


@pytest.mark.parametrize(
    ("changed", "images", "titles"),
    [
        ({"evaluation__k": 500}, None, ["k = 5000", "k = 500"]),
        ({"evaluation__k": 50000}, None, ["k = 50000", "k = 5000"]),
        ({"evaluation__weights": "best"}, None, ["k = 5000, weights best", "k = 5000, weights last"]),
        ({"device__precision": "float64"}, None, ["k = 5000, precision float32", "k = 5000, precision float64"]),
        ({}, "another binarization", ["k = 5000, images 394d00aa", "k = 5000, images 8f16e351"]),
    ],
)
def test_every_kind_of_evaluation_has_a_table_of_its_own(
    tmp_path: Path, changed: dict[str, Any], images: str | None, titles: list[str]
) -> None:
    """However few runs have it; also where a key names the data, of which another set has other images anyway."""
    for seed in range(2):
        write(tmp_path, config(seed=seed), values(85.0))
    write(tmp_path, config(seed=2, **changed), values(84.0), images=images or "one binarization")
    scored, left_out = comparable(read([tmp_path]).runs, "test")
    made = tables(scored)
    if images is not None:
        made.sort(key=lambda one: one.title)
    assert not left_out and [one.title for one in made] == [f"mnist, test, {title}" for title in titles]
    assert sorted([round(cell.nll, 6) for one in made for cell in one.cells]) == [84.0, 85.0]
    write(tmp_path, config(), values(100.0), data="omniglot", images="omniglot")
    both = tables(comparable(read([tmp_path]).runs, "test")[0], ["data"], ["objective"])
    assert sorted([round(cell.nll, 6) for one in both for cell in one.cells]) == [84.0, 85.0, 100.0]
    assert len(both) == 2


def test_a_run_is_in_the_table_of_each_of_its_evaluations(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, config(seed=seed), values(85.0))
    late = write(tmp_path, config(seed=2, evaluation__k=500), values(85.9))
    fits = write(tmp_path / "elsewhere", config(seed=2), values(85.3))
    (late / "evaluations").mkdir()
    fits.rename(late / "evaluations" / "k5000")
    scored, left_out = comparable(read([tmp_path]).runs, "test")
    large, small = tables(scored)
    assert not left_out and [len(cell.runs) for cell in (*large.cells, *small.cells)] == [3, 1]
    assert [(made.k, round(made.cells[0].runs[-1].numbers["nll"], 6)) for made in (large, small)] == [
        (5000, 85.3), (500, 85.9),
    ]  # fmt: skip


def test_a_missing_number_is_left_out_with_its_reason(tmp_path: Path) -> None:
    folder = write(tmp_path, config(), values(85.0))
    test = json.loads((folder / "result.json").read_text())["test"]
    change(folder / "result.json", test={**test, "nll": None}, reasons={"test.nll": "weights overflowed"})
    scored, (left,) = comparable(read([tmp_path]).runs, "test")
    assert not scored and left.state == "no number" and "weights overflowed" in left.why
    _, (left,) = comparable(read([tmp_path]).runs, "validation")
    assert "validation split was not evaluated" in left.why


def test_an_exact_nll_stands_beside_its_estimate(tmp_path: Path) -> None:
    assert "exact NLL" not in table(write(tmp_path, config(), values(85.0))).names
    folder = write(tmp_path, config(seed=1), values(86.0))
    test = json.loads((folder / "result.json").read_text())["test"]
    change(folder / "result.json", test={**test, "exact_nll": 85.9})
    made = table(folder)
    assert [field.text for field in made.fields(made.cells[0])][:2] == ["86.00 ± 0.13", "85.90"]
    assert made.names[1] == "exact NLL"


def test_commands_of_the_docs_have_the_published_values_that_they_quote(tmp_path: Path) -> None:
    page = (CONF.parent / "docs" / "results.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^iwae-train (.+?) +# paper: (\S+)$", page, re.MULTILINE)
    assert len(quoted) == 5
    for number, (command, value) in enumerate(quoted):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", command.split(), return_hydra_config=True)
        chosen = cfg.hydra.runtime.choices
        plain = OmegaConf.create({key: node for key, node in cfg.items() if key != "hydra"})
        settings: Any = OmegaConf.to_container(plain, resolve=True)
        place = tmp_path / str(number)
        write(place, settings, values(100.0), data=chosen.data, names=(chosen.model, chosen.objective))
        (cell,) = table(place).cells
        assert cell.published is not None and f"{cell.published.nll:.2f}" == value and not cell.deviations, command


@pytest.mark.parametrize("data", ["mnist", "omniglot", "mnist_fixed"])
def test_every_cell_of_burda_is_reached(tmp_path: Path, data: str) -> None:
    """Under any name of the run, and not marked as trained otherwise."""
    cells = {key: value for key, value in TABLE.items() if key[0] == data and key[2] in ("iwae", "elbo")}
    assert len(cells) >= 6
    for _, layers, objective, k in cells:
        settings = config("one_layer" if layers == 1 else "two_layer", objective, k)
        write(tmp_path, settings, values(100.0), data=data, names=("mine", "my_objective"))
    found = {cell.published: cell for cell in table(tmp_path, ["model.latent_sizes"], ["objective"]).cells}
    assert found.keys() == set(cells.values()) and not any(cell.deviations for cell in found.values())


def test_table_2_stands_beside_its_second_stage(tmp_path: Path) -> None:
    second = {"init_from": "outputs/mnist-one_layer-elbo-k1-seed0-01234567", "with_optimizer": True}
    settings = config(**second, optimizer__lr=1e-4)
    settings["schedule"] = {"_target_": "iwae_cli.training.schedule.Constant", "passes": 2187}
    write(tmp_path, settings, values(85.0))
    (cell,) = table(tmp_path).cells
    assert cell.published is not None and cell.published.nll == 84.88 and not cell.deviations


@pytest.mark.parametrize(
    "changed",
    [
        *({"evaluation__k": 500}, {"evaluation__weights": "best"}, {"model__latent_sizes": [40]}),
        *({"model__hidden_sizes": [[200]]}, {"model__likelihood": "discretized_logistic"}),
        *({"objective__gradient": "dreg"}, {"objective__k": 49}, {"train": "inference"}),
        *({"init_from": "outputs/mnist-one_layer-vr-k5-seed0-01234567"}, {"data": "mnist_grey"}, {"data": "digits"}),
    ],
)
def test_no_published_value_beside_anything_else(tmp_path: Path, changed: dict[str, Any]) -> None:
    data = changed.pop("data", "mnist")
    write(tmp_path, config(**changed), values(85.0), data=data)
    assert table(tmp_path).cells[0].published is None


def test_a_shorter_training_is_marked(tmp_path: Path) -> None:
    write(tmp_path, config(schedule__stages=3), values(90.0))
    (cell,) = table(tmp_path).cells
    assert cell.published is not None and cell.deviations == ("schedule.stages = 3 (paper: 8)",)
