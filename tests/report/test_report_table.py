from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_runs import Command, change, config, values, write
from small_runs import TINY, finished, read_json

from iwae_cli.cli.compose import plan
from iwae_cli.cli.evaluate import evaluate as iwae_eval
from iwae_cli.core.errors import UserError
from iwae_cli.record.summary import measured
from iwae_cli.report.cells import Table, tables
from iwae_cli.report.published import TABLE
from iwae_cli.report.reader import read
from iwae_cli.report.selection import MISSING, comparable

CONF = Path(__file__).resolve().parents[2] / "conf"


def table(place: Path, rows: list[str] | None = None, columns: list[str] | None = None) -> Table:
    scored, left_out = comparable(read([place]).runs, "test")
    assert not left_out
    (made,) = tables(scored, rows, columns)
    return made


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
    assert made.cells[0].bounds == pytest.approx({1: -89.2, 50: -86.7, 5000: -86.2})
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


TRAINING, MINE = "training__backward", "mine.Mine"
APART: dict[str, tuple[list[dict[str, Any]], dict[str, int], int]] = {
    "a rate": ([{"optimizer__lr": rate} for rate in (0.001, 0.001, 0.0003)], {"optimizer.lr": 2}, 2),
    "what cannot change the last weights": (
        [
            {},
            {"logger__wandb__mode": "online"},
            {"device__kind": "cuda"},
            {"data__data_dir": "x"},
            {"validation__k": 5},
        ],
        {},
        1,
    ),
    "classes of a user with the arguments of ours": (
        [{}, {"objective___target_": MINE}, {"schedule___target_": MINE}],
        {"objective._target_": 2, "schedule._target_": 2},
        3,
    ),
    "gradients": (
        [{"objective__gradient": name} for name in ("total", "dreg", "dreg", "stl")],
        {"objective.gradient": 3},
        3,
    ),
    # Without a roulette tau decides nothing, and older runs, which have neither, were trained by all.
    "a roulette": (
        [{"training": None}, {}, {"training__tau": 0.05}, {TRAINING: "roulette"}, {TRAINING: "roulette"}],
        {"training.backward": 2},
        2,
    ),
}
"""Runs of one seed each -> keys that are added to the rows with the number of their values, and the cells."""


@pytest.mark.parametrize("what", APART)
def test_only_seeds_are_averaged(tmp_path: Path, what: str) -> None:
    runs, keys, cells = APART[what]
    for seed, changed in enumerate(runs):
        settings = config(seed=seed, **changed)
        write(tmp_path, {key: value for key, value in settings.items() if value or key != "training"}, values(85.0))
    made = table(tmp_path, ["objective.k"], [])
    found = {key: len({cell.row[place] for cell in made.cells}) for place, key in enumerate(made.rows)}
    assert found == {"objective.k": 1, **keys} and len(made.cells) == cells
    assert sum(len(cell.runs) for cell in made.cells) == len(runs)
    assert all(any(key in note for note in made.notes) for key in keys)


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
    for seed, version in enumerate(("one_layer", "gaussian_mlp_50")):
        first = tmp_path / "named" / f"mnist-{version}-elbo-k1-seed{seed}-0123456{seed}"
        first.mkdir(parents=True)
        (first / "config.yaml").write_text(yaml.safe_dump(config(seed=seed)))
        write(tmp_path / "other_names", config(seed=seed, init_from=str(first)), values(85.0))
    assert len(table(tmp_path / "other_names").cells) == 1


def second_stages(place: Path, *first: Path) -> Path:
    """Write a second stage for each first one, with seeds 0, 1, ...; return their folder."""
    for seed, source in enumerate(first):
        write(place / "second", config(seed=seed, init_from=str(source)), values(85.0 + seed))
    return place / "second"


ARRAYS = {"_target_": "iwae_cli.data.own.ArrayFile", "path": "x.npz", "levels": 2}


@pytest.mark.parametrize("what", ["data", "code", "the stage before"])
def test_a_first_stage_is_more_than_its_own_settings(tmp_path: Path, what: str) -> None:
    """Two seeds of a first stage are one; they differ in what their config.yaml does not show."""
    zeroth = [write(tmp_path / "0", config(optimizer__lr=rate), values(85.0)) for rate in (1e-3, 1e-4)]

    def first(name: str, seed: int, differs: bool) -> Path:
        before = str(zeroth[differs]) if what == "the stage before" else None
        folder = write(tmp_path / name, config(seed=seed, data=ARRAYS, init_from=before), values(85.0))
        code = {"mine.py": str(int(differs and what == "code"))}
        change(folder / "result.json", data_sha256=str(int(differs and what == "data")), sources=code)
        return folder

    alike = second_stages(tmp_path / "alike", *(first(f"a{seed}", seed, differs=False) for seed in range(2)))
    assert [len(cell.runs) for cell in table(alike).cells] == [2]
    apart = second_stages(tmp_path / "apart", *(first(f"b{seed}", seed, differs=seed == 1) for seed in range(2)))
    assert [len(cell.runs) for cell in table(apart).cells] == [1, 1]


def test_second_stages_of_unreadable_first_ones_stay_apart(tmp_path: Path, command: Command) -> None:
    """What remains of these is the name of the folder, whose hash is of the seed too."""
    first = [write(tmp_path, config(optimizer__lr=rate, seed=s), values(85.0)) for s, rate in enumerate((1e-3, 1e-4))]
    names = [folder.name for folder in first]
    second = second_stages(tmp_path, *first)
    for folder in first:
        shutil.rmtree(folder)
    assert [cell.row[-1] for cell in table(second).cells] == names
    code, out, _ = command(second)
    assert code == 0 and f"have a row each until it is back there: {names[0]}, {names[1]}" in out


def test_a_second_stage_has_recorded_its_first_one(tmp_path: Path) -> None:
    """The first one may be gone when the report is made; the record also identifies a stage that began from that."""
    stages = [(*TINY, f"seed={seed}") for seed in range(2)]
    first = [finished(tmp_path / "1", *stage) for stage in stages]
    seconds = [finished(tmp_path / "2", *stage, f"init_from={at}") for stage, at in zip(stages, first, strict=True)]
    third = [finished(tmp_path / "3", *stage, f"init_from={at}") for stage, at in zip(stages, seconds, strict=True)]
    change(seconds[1] / "result.json", init_from_training=None)
    assert [len(cell.runs) for cell in table(tmp_path / "2").cells] == [2], "with one of an earlier version"
    change(seconds[1] / "result.json", init_from_training=read([seconds[0]]).runs[0].result["init_from_training"])
    shutil.rmtree(tmp_path / "1")
    assert [len(cell.runs) for cell in table(tmp_path / "2").cells] == [2]
    assert iwae_eval([str(seconds[0]), "evaluation.k=7"]) == 0
    (again,) = seconds[0].glob("evaluations/k7-*/result.json")
    assert read_json(again)["init_from_training"] == read_json(seconds[0] / "result.json")["init_from_training"]
    for folder in third:
        change(folder / "result.json", init_from_training=None)
    assert [len(cell.runs) for cell in table(tmp_path / "3").cells] == [2]


def test_a_run_that_names_itself_as_its_first_stage_is_read(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    (first / "config.yaml").write_text(yaml.safe_dump(config(init_from=str(first))))
    assert len(table(second_stages(tmp_path, first)).cells) == 1


def test_seeds_trained_by_other_code_are_told_apart(tmp_path: Path, command: Command) -> None:
    """Older runs have not recorded the code of a user's class, and count as alike."""
    hashes: list[dict[str, str]] = [{}, {"mine/halfway.py": "1" * 16}, {"mine/halfway.py": "1" * 16}]
    for seed, sources in enumerate(hashes):
        change(write(tmp_path, config(seed=seed), values(85.0)) / "result.json", sources=sources)
    assert [len(cell.runs) for cell in table(tmp_path).cells] == [3]
    change(write(tmp_path, config(seed=3), values(86.0)) / "result.json", sources={"mine/halfway.py": "2" * 16})
    code, out, _ = command(tmp_path, "--columns", "")
    assert code == 0 and "rows also by sources.mine/halfway.py: runs of one cell differ by their seed alone" in out
    seeds = {cell.row[-1]: [s.run.seed for s in cell.runs] for cell in table(tmp_path).cells}
    assert seeds == {MISSING: [0], "11111111": [1, 2], "22222222": [3]}
    # The run without a record once more, with one: not a second seed.
    again = write(tmp_path, config(seed=0, validation__k=77), values(85.0))
    change(again / "result.json", sources={"mine/halfway.py": "1" * 16})
    assert [one.state for one in comparable(read([tmp_path]).runs, "test")[1]] == ["repeated"]
    assert (
        command(tmp_path, "--compare", "sources.mine/halfway.py=11111111", "sources.mine/halfway.py=22222222")[0] == 0
    )


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
        (job,) = plan(command.split(), False, None).jobs
        place = tmp_path / str(number)
        names = (job.names["model"], job.names["objective"])
        write(place, job.config, values(100.0), data=job.names["data"], names=names)
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
        *({"model__prior": "vamp"}, {"model__posterior": "full"}, {"model__activation": "relu"}),
        *({"objective__gradient": "dreg"}, {"objective__k": 49}, {"train": "inference"}),
        *({"init_from": "outputs/mnist-one_layer-vr-k5-seed0-01234567"}, {"data": "mnist_grey"}, {"data": "digits"}),
    ],
)
def test_no_published_value_beside_anything_else(tmp_path: Path, changed: dict[str, Any]) -> None:
    data = changed.pop("data", "mnist")
    write(tmp_path, config(**changed), values(85.0), data=data)
    assert table(tmp_path).cells[0].published is None


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"training__kl_warmup": 100}, "training.kl_warmup = 100 (paper: 0)"),
        ({"training__clip": 1.0}, "training.clip = 1.0 (paper: None)"),
        ({"training__ema": 0.999}, "training.ema = 0.999 (paper: None)"),
        ({"training__backward": "roulette"}, "training.backward = roulette (paper: all)"),
        ({"device__precision": "float64"}, "device.precision = float64 (paper: float32)"),
        ({"schedule__patience": 9}, "schedule.patience = 9 (paper: None)"),
        ({"optimizer__amsgrad": True}, "optimizer.amsgrad = True (paper: False)"),
    ],
)
def test_another_training_is_marked_beside_the_published_value(
    tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    write(tmp_path, config(**changed), values(85.0))
    (cell,) = table(tmp_path).cells
    assert cell.published is not None and cell.deviations == (expected,)
