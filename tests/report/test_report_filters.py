"""Filters choose by what an evaluation was made with; the commands that a report advises make the evaluation shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from report_runs import Command, config, evaluate, values, write
from small_runs import TINY, finished

from iwae_cli.cli.evaluate import evaluate as evaluate_command
from iwae_cli.report.reader import NOT_RECORDED, read
from iwae_cli.report.selection import MISSING, comparable, unrefined

EVALUATIONS = (
    ("evaluation.images=6", "evaluation.k=20"),
    ("evaluation.seed=3", "evaluation.k=20", "evaluation.refine=5"),
    ("evaluation.binarization_seed=1", "evaluation.images=4", "evaluation.refine=all", "evaluation.jackknife=true"),
    ("evaluation.splits=[validation]", "evaluation.seed=3", "evaluation.images=8", "evaluation.weights=best"),
    ("evaluation.images=null", "evaluation.k=10"),
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits, evaluated in six ways."""
    made = finished(tmp_path_factory.mktemp("outputs"), *TINY, "evaluation.workers=1", "evaluation.images=12")
    for options in EVALUATIONS:
        assert evaluate_command([str(made), *options, "evaluation.workers=1"]) == 0
    return made


def names(command: Command, *arguments: object) -> set[str]:
    """The evaluations in the tables of a report, without the hashes."""
    code, out, err = command(*arguments, "--format", "json")
    assert (code, err) == (0, ""), err
    cells = [cell for table in json.loads(out)["tables"] for cell in table["cells"]]
    return {run["evaluation"].rpartition("-")[0] for cell in cells for run in cell["runs"]}


OWN, SEEDED, SIX, FOUR = (f"k{k}-first{n}+test-last" for k, n in ((50, 12), (20, 12), (20, 6), (50, 4)))
WHOLE = "k10-test-last"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("evaluation.images=6", {SIX}),
        ("evaluation.images=null", {WHOLE}),
        ("evaluation.images=4,6", {FOUR, SIX}),
        ("evaluation.seed=3", {SEEDED}),
        ("evaluation.seed=0 evaluation.images=12", {OWN}),
        ("evaluation.binarization_seed=1", {FOUR}),
        ("evaluation.jackknife=true", {FOUR}),
        ("evaluation.refine=all", {FOUR}),
        ("evaluation.refine=5", {SEEDED}),
        ("evaluation.refine=0,5 evaluation.k=20", {SEEDED, SIX}),
        ("evaluation.splits=[test] seed=0", {OWN, SEEDED, FOUR, SIX, WHOLE}),
        ("--split validation evaluation.splits=[validation]", {"k50-first8+validation-best"}),
    ],
)
def test_evaluations_are_chosen_by_what_they_were_made_with(
    real: Path, command: Command, filters: str, expected: set[str]
) -> None:
    assert names(command, real, *shlex.split(filters)) == expected
    if "--split" not in filters:
        both = command(real, "--compare", filters, filters)[2]
        assert "both hold" in both, "the sides of --compare choose among the same"


def test_a_column_of_a_key_has_the_value_of_each_evaluation(real: Path, command: Command) -> None:
    made = json.loads(command(real, "--columns", "evaluation.images,evaluation.seed", "--format", "json")[1])
    shown = {
        (cell["keys"]["evaluation.images"], cell["keys"]["evaluation.seed"])
        for table in made["tables"]
        for cell in table["cells"]
    }
    assert shown == {("12", "0"), ("12", "3"), ("6", "0"), ("4", "0"), (MISSING, "0")}


def test_what_no_record_holds_is_not_guessed(tmp_path: Path, command: Command) -> None:
    """The name of this evaluation is not the one that its settings give; values of all images say all or a number."""
    folder = write(tmp_path, config(), values(85.0, 40))
    evaluate(folder, config(evaluation__k=500), values(86.0, 40), "odd", refined=values(85.5, 40))
    path = folder / "evaluations" / "odd" / "result.json"
    path.write_text(re.sub(r"(k500-test-last)-\w+", r"\1-odd", path.read_text()))
    (run,) = read([folder]).runs
    assert [score.keys["evaluation.refine"] for score in run.scores] == [0, NOT_RECORDED]
    assert run.scores[1].keys["evaluation.images"] is None and run.scores[1].keys["evaluation.jackknife"] is False
    code, _, err = command(folder, "evaluation.refine=all")
    assert code == 2 and "evaluation.refine is 0, not recorded" in err
    out = command(folder, "evaluation.refine=0")[1]
    assert "1 evaluation left out, of which evaluation.refine is not recorded" in out


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_advice_for_refined_values_makes_the_evaluation_shown(real: Path, command: Command, split: str) -> None:
    """Typed as printed, with the folder in place of RUN, it refines the evaluation that it is about."""

    def shown() -> dict[Any, Any]:
        made = json.loads(command(real, "--split", split, "--rows", "seed", "--format", "json")[1])
        return {(t["k"], t["weights"], t["cells"][0]["runs"][0]["sha256"]): t["cells"][0] for t in made["tables"]}

    before = shown()
    scored = comparable(read([real]).runs, split)[0]
    advice = {s.numbers["n"]: line.partition(": ")[2] for s in scored if (line := unrefined([s]))}
    assert advice.keys() == ({250, 12, 6} if split == "test" else {8})
    assert "evaluation.images=null" in advice.pop(250, "evaluation.images=null"), "it would take minutes"
    for line in advice.values():
        program, run, *options = shlex.split(line)
        assert (program, run) == ("iwae-eval", "RUN")
        assert evaluate_command([str(real), *options, "evaluation.workers=1"]) == 0
    after = shown()
    assert after.keys() == before.keys(), "no table more"
    nlls = ({key: cell["nll"] for key, cell in made.items()} for made in (after, before))
    assert next(nlls) == pytest.approx(next(nlls), abs=1e-12)
    assert sum(cell["refined"] is not None for cell in after.values()) >= len(advice)


def test_choices_lists_and_null_are_typed_as_for_training(tmp_path: Path, command: Command) -> None:
    own = {"_target_": "iwae_cli.data.own.ArrayFile", "path": "x.npz", "levels": 2}
    for seed in range(3):
        write(tmp_path, config(seed=seed), values(85.0))
        write(tmp_path, config("two_layer", "elbo", seed=seed), values(86.0), names=("two_layer", "elbo"))
    write(tmp_path, config(data=own), values(80.0), data="file_x")

    def seeds(*filters: str) -> list[tuple[str, list[int]]]:
        code, out, err = command(tmp_path, *filters, "--rows", "data,objective", "--columns", "", "--format", "json")
        assert code == 0, err
        cells = [cell for table in json.loads(out)["tables"] for cell in table["cells"]]
        return [(" ".join(cell["keys"].values()), cell["seeds"]) for cell in cells]

    assert seeds("seed=0,2", "data=mnist") == [("mnist elbo", [0, 2]), ("mnist iwae", [0, 2])]
    assert seeds("objective=elbo,iwae", "seed=1.0") == [("mnist elbo", [1]), ("mnist iwae", [1])]
    assert seeds("data=file") == seeds("data=file_x") == [("file_x iwae", [0])]
    write(tmp_path, config(data=own, seed=3), values(80.0), data="file")
    assert seeds("data=file") == [("file iwae", [3]), ("file_x iwae", [0])], "also beside a data set of that name"
    assert seeds("data=file,mnist", "seed=0", "objective=iwae", "init_from=null") == [
        ("file_x iwae", [0]),
        ("mnist iwae", [0]),
    ]
    assert seeds("model.latent_sizes=[100,50]", "training.clip=NULL")[0][0] == "mnist elbo"
    assert len(seeds("model.latent_sizes=[50],[100, 50]", "seed=1")) == 2
    for filters, words in (
        ("=5", "=5 is neither a folder nor KEY=VALUE, such as objective=elbo"),
        ("objective=", "objective=: no finished run is that; objective is elbo, iwae"),
        ("seed=0,7", "no finished run is that; seed is 0, 1, 2"),
        ("objective=elbo,iwea", "did you mean objective=iwae?"),
        ("seed=0 seed=1", "a key is there twice; write several choices as seed=0,1"),
        ("evaluation.image=5", "no run has the key evaluation.image; did you mean evaluation.images?"),
    ):
        code, out, err = command(tmp_path, *filters.split())
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err
