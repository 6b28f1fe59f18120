from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_runs import Command, change, config, evaluate, values, write, write_estimate
from small_runs import snapshot

from iwae_cli.cli.evaluate import evaluate as evaluate_command
from iwae_cli.cli.report import HELP
from iwae_cli.cli.train import train
from iwae_cli.report.cells import tables
from iwae_cli.report.reader import read
from iwae_cli.report.selection import MISSING, comparable
from iwae_cli.report.writers import Report, terminal


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of two cells of Table 1, one cell trained otherwise, and one run that failed."""
    place = tmp_path / "outputs"
    for seed, nll in enumerate((84.7, 85.0)):
        write(place, config(seed=seed), values(nll, seed=seed), units=[24 + seed])
        elbo = config(objective="elbo", seed=seed, schedule__stages=3)
        write(place, elbo, values(nll + 2, seed=seed), names=("one_layer", "elbo"), units=[19])
    write(place, config("two_layer"), values(82.9), names=("two_layer", "iwae"), units=[26, 7])
    bad = write(place, config(seed=9), values(80.0))
    (bad / "result.json").unlink()
    change(bad / "status.json", status="failed", step=3, error="RunFailed: a | b <script>alert(1)</script> \\x % _")
    return place


def test_the_table_of_a_terminal(runs: Path, command: Command) -> None:
    code, out, err = command(runs)
    assert (code, err) == (0, "")
    one_layer = next(line for line in out.splitlines() if line.strip().startswith("one_layer"))
    # 84.85 and .3 / sqrt(2) / sqrt(2)
    for number in ("86.85 ± 0.15", "84.85 ± 0.15", "24.5 of 50", "86.35 / 20*†", "84.78 / 25*"):
        assert number in one_layer
    assert "82.90 / 26+7*" in out and "26 of 100 + 7 of 50" in out and "schedule.stages = 3 (paper: 8)" in out
    assert "1 failed" in out and "at step 3: RunFailed" in out and "40 images" in out
    found = read([runs])
    made = Report(found, [], tables(comparable(found.runs, "test")[0]), [])
    wide, narrow = terminal(made), terminal(made, width=95)
    assert max(map(len, wide.splitlines()[:6])) > 95 >= max(map(len, narrow.splitlines()[:6]))
    assert all(number in narrow for number in ("86.85 ± 0.15", "84.85 ± 0.15", "82.90"))


def test_every_format_has_the_same_numbers(runs: Path, command: Command) -> None:
    made = {form: command(runs, "--format", form) for form in ("markdown", "csv", "latex", "json")}
    assert all(code == 0 for code, _, _ in made.values())

    value = json.loads(made["json"][1], parse_constant=pytest.fail)
    cells = {(cell["keys"]["objective"], cell["keys"]["model"]): cell for cell in value["tables"][0]["cells"]}
    iwae = cells["iwae", "one_layer"]
    assert iwae["nll"] == pytest.approx(84.85) and iwae["stderr_seeds"] == pytest.approx(0.15)
    assert (iwae["paper"]["nll"], iwae["paper"]["active_units"]) == (84.78, [25])
    assert iwae["paper"]["trained_otherwise"] == [] and "1509.00519" in iwae["paper"]["source"]
    assert [run["seed"] for run in iwae["runs"]] == [0, 1]
    assert value["left_out"][0]["state"] == "failed"

    rows = {(row["objective"], row["model"]): row for row in csv.DictReader(io.StringIO(made["csv"][1]))}
    assert rows.keys() == cells.keys()
    assert float(rows["iwae", "one_layer"]["nll"]) == iwae["nll"]
    assert rows["elbo", "one_layer"]["paper_training"] == "schedule.stages = 3 (paper: 8)"
    assert rows["iwae", "two_layer"]["stderr_seeds"] == "" and rows["iwae", "two_layer"]["active_units"] == "26+7"
    assert "1 failed" in made["csv"][2], "people see it beside a table for programs"

    table = [line for line in made["markdown"][1].splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(widths) == 1 and len(table) == 4
    assert "84.85 ± 0.15" in table[2] and "a \\| b \\<script" in made["markdown"][1]

    latex = made["latex"][1]
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    columns = re.search(r"tabular}{(\w+)}", latex)
    assert columns is not None
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines[1:]} == {len(columns[1])}
    assert r"84.85 $\pm$ 0.15" in latex and r"one\_layer" in latex and r"86.35 / 20$^*$$^\dagger$" in latex
    comments = [line for line in latex.splitlines() if "failed" in line]
    assert comments and all(line.startswith("%") for line in comments)


def test_weak_evaluations_of_one_run_are_not_counted_as_runs(tmp_path: Path, command: Command) -> None:
    folder = write(tmp_path, config(), values(85.0))
    evaluate(folder, config(evaluation__k=500), values(85.0), "small")
    for path in (folder / "result.json", folder / "evaluations" / "small" / "result.json"):
        change(path, test=json.loads(path.read_text())["test"] | {"ess_share_below_10": 0.5})
    assert "warning: weak estimates of log p(x): 2 of 2 evaluations; of the worst, " in command(tmp_path)[1]
    assert "log p(x): 1 of 1 runs; of the worst, " in command(tmp_path, "evaluation.k=500")[1]


def test_programs_can_tell_every_evaluation_apart(tmp_path: Path, command: Command) -> None:
    """Two rows or tables of one run differ in a column that says why, as the titles do."""
    folder = write(tmp_path, config(), values(85.0))
    evaluate(folder, config(evaluation__seed=7), values(85.0), "seeded")
    evaluate(folder, config(device__precision="float64"), values(85.0), "float64")
    evaluate(folder, config(evaluation__binarization_seed=1), values(85.0), "binarized", images="another binarization")
    rows = list(csv.DictReader(io.StringIO(command(tmp_path, "--format", "csv")[1])))
    identifying = ("precision", "images_sha256", "evaluation_seed")
    assert len(rows) == len({tuple(row[key] for key in identifying) for row in rows}) == 4
    assert len({row["evaluations"] for row in rows}) == 4
    made = json.loads(command(tmp_path, "--format", "json")[1])["tables"]
    found = [
        (t["precision"], *t["images_sha256"].values(), str(t["cells"][0]["runs"][0]["evaluation_seed"])) for t in made
    ]
    assert found == [tuple(row[key] for key in identifying) for row in rows]


def test_real_runs_to_the_last_digit(real_runs: list[Path], command: Command) -> None:
    folders = real_runs
    before = [snapshot(folder) for folder in folders]
    code, out, err = command(folders[0].parent, "--format", "json", "--compare", *folders)
    assert (code, err) == (0, "")
    value = json.loads(out)
    (cell,) = value["tables"][0]["cells"]
    nlls = [json.loads((folder / "result.json").read_text())["test"]["nll"] for folder in folders]
    assert cell["nll"] == pytest.approx(np.mean(nlls), abs=1e-12)
    assert cell["stderr_seeds"] == pytest.approx(abs(nlls[0] - nlls[1]) / 2, abs=1e-12)
    assert cell["paper"] is None and cell["active_units"] is not None
    a, b = (np.load(folder / "log_likelihood.npz")["log_px"] for folder in folders)
    (paired,) = value["comparisons"]
    assert paired["difference"] == pytest.approx((a - b).mean(), abs=1e-12)
    assert paired["stderr_images"] == pytest.approx((a - b).std(ddof=1) / len(a) ** 0.5)
    assert (paired["wins_a"], paired["wins_b"]) == ((a > b).sum(), (a < b).sum())
    assert [snapshot(folder) for folder in folders] == before, "runs are read only"


def test_the_numbers_of_every_estimator_are_shown(runs: Path, command: Command) -> None:
    """From the rows in result.json: AIS with a column per split, and an estimator that no version has."""
    folder = next(runs.glob("*-iwae-k50-seed1-*"))
    write_estimate(folder, "ais", {"test": {"nll_ais": 84.123}, "validation": {"nll_ais": None}}, [
        ["NLL_AIS, nats", "test.nll_ais", "{:.2f}"], ["NLL_AIS, nats", "validation.nll_ais", "{:.2f}"],
    ])  # fmt: skip
    write_estimate(folder, "mine", {"entropy": 1.5}, [["entropy, nats", "entropy", "{:.3f}"]])
    write_estimate(folder, "stale", {"entropy": 2.5}, [["entropy, nats", "entropy", "{:.3f}"]], steps=7)
    code, out, _ = command(runs, "--html", runs.parent / "page.html")
    lines = out.splitlines()
    assert code == 0
    ais, mine = (lines.index(f"{folder.name}, {name}-last-01234567:") for name in ("ais", "mine"))
    assert lines[ais + 1] == f"  NLL_AIS, nats: test 84.12, validation {MISSING}"
    assert lines[mine + 1] == "  entropy, nats: 1.500" and "stale" not in out
    text = (runs.parent / "page.html").read_text()
    for part in ("ais-last-01234567", "<th>validation</th>", "<td>84.12</td>", "<td>1.500</td>"):
        assert text.count(part) == 1
    for form in ("markdown", "latex"):
        assert "84.12" in command(runs, "--format", form)[1]
    first, second = json.loads(command(runs, "--format", "json")[1])["estimates"]
    assert (first["estimator"], first["seed"]) == ("ais", 1) and second["numbers"] == {"entropy": 1.5}
    assert first["numbers"] == {"test.nll_ais": 84.123, "validation.nll_ais": None}


def test_a_difference_by_hand(tmp_path: Path, command: Command) -> None:
    """Three seeds against two, by the evaluation of the largest k that all have."""
    base, extra = np.array([-80.0, -90.0, -70.0, -60.0, -50.0]), np.array([0.0, 0.0, 0.0, 4.0, 1.75])
    sides = (("iwae", (0.0, 0.25, 0.5), 0 * extra), ("elbo", (-1.0, -2.0), extra))
    for name, shifts, more in sides:
        for seed, shift in enumerate(shifts):
            settings, options = config(objective=name, seed=seed), {"names": ("one_layer", name)}
            folder = write(tmp_path, settings, base + shift + more, **options)
            evaluate(folder, config(objective=name, seed=seed, evaluation__k=500), base, "k500", **options)
    shown = command(tmp_path, "--compare", "objective=iwae", "objective=elbo", "--format", "json")[1]
    (paired,) = json.loads(shown)["comparisons"]
    # Over seeds .25, and -1.5 + extra: differences 1.75, 1.75, 1.75, -2.25, 0; variances .0625 of 3 means and .5 of 2.
    assert paired["difference"] == pytest.approx(0.6) and paired["k"] == 5000
    assert paired["stderr_images"] == pytest.approx((12.45 / 4 / 5) ** 0.5)
    assert paired["stderr_seeds"] == pytest.approx((0.0625 / 3 + 0.5 / 2) ** 0.5)
    assert (paired["wins_a"], paired["wins_b"], paired["ties"], paired["seeds_a"]) == (3, 1, 1, [0, 1, 2])


def test_an_ambiguous_side_is_answered_with_overrides_that_work(tmp_path: Path, command: Command) -> None:
    """Quick runs beside smoke ones, which are evaluated differently too."""
    place = tmp_path / "outputs"
    for objective in ("iwae", "elbo"):
        names = ("one_layer", objective)
        quick = {"schedule": {"_target_": "iwae_cli.training.schedule.Exponential", "passes": 100, "final": 0.1}}
        smoke = {"schedule": {"_target_": "iwae_cli.training.schedule.Constant", "passes": 3}, "evaluation__k": 500}
        for choice, settings in (("quick", quick), ("smoke", smoke)):
            write(place, config(objective=objective, **settings), values(85.0), names=names, choices=("adam", choice))
    code, _, err = command(place, "--compare", "objective=iwae", "objective=elbo")
    assert code == 2
    first, second = re.findall(r'"(objective=iwae schedule=\w+)"', err)
    assert (first, second) == ("objective=iwae schedule=quick", "objective=iwae schedule=smoke")
    for choice in (first, second):
        assert command(place, "--compare", choice, choice.replace("iwae", "elbo"))[0] == 0


def test_differences_of_a_whole_table(tmp_path: Path, command: Command) -> None:
    """Two seeds of ELBO and IWAE at two values of k, and one of VR that has no ELBO at its k; by hand."""
    place, shift = tmp_path / "outputs", {("elbo", 5): 0.0, ("elbo", 50): 1.0, ("iwae", 5): 0.5, ("iwae", 50): 1.25}
    noise = np.array([-1.0, 1.0, 0.0, 0.0])
    for (objective, k), gain in shift.items():
        for seed in range(2):
            log_px = -90 + gain + seed * 0.1 * (objective == "iwae") + noise * (objective == "iwae")
            settings = config(objective=objective, k=k, seed=seed)
            write(place, settings, log_px + np.zeros(4), names=("one_layer", objective), units=[20], data="digits")
    alone = config("one_layer", "vr", k=8)
    write(place, alone, np.full(4, -89.0), names=("one_layer", "vr"), units=[20], data="digits")
    asked = (place, "--rows", "objective,objective.k", "--against", "objective=elbo")
    code, out, err = command(*asked)
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if line.startswith((" elbo", " iwae", " vr"))]
    table = [re.sub(r"  +", " ", line.strip()) for line in rows]
    # Mean over seeds of the gains .5 and .6 (and .25, .35); over images sd sqrt(2/3) of 4; over seeds var .005 of 2.
    assert table == [
        f"elbo 5 90.00 ± 0.00 2 {MISSING} {MISSING} {MISSING} 0.00 0.0040 -0.0020 20 of 50 1 1",
        f"elbo 50 89.00 ± 0.00 2 {MISSING} {MISSING} {MISSING} 0.00 0.0040 -0.0020 20 of 50 1 1",
        "iwae 5 89.450 ± 0.050 2 +0.55 0.41 0.050 0.41 0.0040 -0.0020 20 of 50 1 1",
        "iwae 50 88.700 ± 0.050 2 +0.30 0.41 0.050 0.41 0.0040 -0.0020 20 of 50 1 1",
        f"vr 8 89.00 1 {MISSING} {MISSING} {MISSING} 0.00 0.0040 -0.0020 20 of 50 1 1",
    ]
    assert "no difference is seen (below 2 standard errors): iwae 5, iwae 50" in out, "a difference of 1.3 of them"
    assert "beside it the standard error over images and that over seeds\n" in out
    read = list(csv.DictReader(io.StringIO(command(*asked, "--format", "csv")[1])))
    assert [row["against"] for row in read] == ["", "", "objective=elbo", "objective=elbo", ""]
    assert float(read[2]["difference_stderr_seeds"]) == pytest.approx(0.05)
    assert [float(row["bias_mc"]) for row in read] == [-0.002] * 5
    one = command(place, "--rows", "objective,objective.k", "--against", "objective=elbo objective.k=5")[1]
    assert "+1.0000" in one and "+1.30" in one, "from one cell for every k"


def test_what_a_filter_leaves_out_is_counted_and_a_folder_may_look_like_one(tmp_path: Path, command: Command) -> None:
    for seed, choice in enumerate(("smoke", "smoke", "quick")):
        settings = config(seed=seed, schedule__stages=1 if choice == "smoke" else 8)
        write(tmp_path / "a=b", settings, values(90.0), choices=("adam", choice))
    code, out, _ = command(tmp_path / "a=b", "schedule=quick", "optimizer=adam")
    assert code == 0 and "note: 2 finished runs without schedule=quick" in out


def test_a_difference_below_two_standard_errors_is_not_seen(tmp_path: Path, command: Command) -> None:
    """+0.018 with an error of 0.014, by hand: 40 differences 0.018 +- 0.014 sqrt(39)."""
    spread = np.repeat([-1.0, 1.0], 20) * 39**0.5
    for objective, gain in (("iwae", spread * 0.014 + 0.018), ("elbo", 0.0 * spread), ("vr", spread * 0.008 + 0.018)):
        write(tmp_path, config(objective=objective), -85.0 + gain, names=("one_layer", objective))
    for side, words in (
        ("iwae", "no difference is seen (+0.018 ± 0.014, below 2 standard errors); A wins 20 images, B 20"),
        ("vr", "A has the lower NLL; A wins 20 images, B 20"),
    ):
        out = command(tmp_path, "--compare", f"objective={side}", "objective=elbo")[1]
        assert words in out and "A - B = +0.018" in out
    shown = json.loads(command(tmp_path, "--compare", "objective=vr", "objective=elbo", "--format", "json")[1])
    assert shown["comparisons"][0]["seen"] is True
    assert shown["comparisons"][0]["stderr"] == pytest.approx(0.008)


def test_a_difference_within_the_bias_is_marked(tmp_path: Path, command: Command) -> None:
    for objective, nll in (("elbo", 85.0), ("iwae", 84.995)):
        write(tmp_path, config(objective=objective), values(nll), names=("one_layer", objective))
    asked = (tmp_path, "--rows", "objective", "--against", "objective=elbo")
    code, out, _ = command(*asked)
    assert code == 0 and "+0.0050‡" in out and "‡ below three times the bias" in out
    assert "caution: one seed on a side" in out and "beside it the standard error over images\n" in out
    assert r"+0.0050$^\ddagger$" in command(*asked, "--format", "latex")[1]


def test_the_default_is_where_iwae_train_writes(runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    expected = command(runs)
    assert expected[0] == 0
    assert command() == expected
    monkeypatch.chdir(runs)
    assert command()[0] == 2
    monkeypatch.setenv("IWAE_OUTPUT_DIR", str(runs))
    assert command() == expected


def test_a_current_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    codes = [command()[0], train(["objective=iwae"]), evaluate_command(["outputs/run"])]
    assert codes == [2] * 3 and capsys.readouterr().err.count(": the current folder is gone: change to") == 2
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere", "nowhere"),
        (". --rows objektive.k", "objektive.k objective.k?"),
        (". --rows model --columns model", "model --rows --columns"),
        (". --format pdf", "pdf"),
        (". --colums model", "--colums"),
        (". --compare objective=iwae", "--compare"),
        (". --compare iwae objective=elbo", "--compare iwae KEY=VALUE"),
        (". --compare objective=iwea objective=elbo", "objective=iwea"),
        (". --compare objective=iwae objective=elbo", "model=one_layer model=two_layer"),
        (". --compare schedule=Burda objective=elbo", "schedule burda"),
        (". --compare 'objective=iwae schedul=burda' x", "schedul schedule?"),
        (". --against objective=vr", "objective elbo, iwae"),
        (". --against seed=1", "seed=1"),
        (". --html .", "folder"),
        (". --html /proc/nowhere/page.html", "/proc/nowhere"),
        (". --split tests", "tests"),
        (". --split validation --compare objective=iwae,model=one_layer objective=elbo", "validation iwae-eval"),
        (". schedul=burda", "schedul schedule?"),
        (". objective=iwea", "objective=iwea elbo, iwae objective=iwae?"),
        (". evaluation.k=50 objective=elbo", "evaluation.k=50 5000"),
        (". objective=elbo model=two_layer", "objective=elbo model=two_layer two_layer"),
    ],
)
def test_wrong_input_is_one_line(
    runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    monkeypatch.chdir(runs)
    code, out, err = command(*shlex.split(arguments))
    assert (code, out) == (2, "") and err.startswith("iwae-report: ") and err.count("\n") == 1
    assert not [word for word in words.split() if word not in err], err


@pytest.mark.parametrize(
    ("changed", "images", "why"),
    [
        ({}, "others", "not scored on the same images"),
        ({"evaluation__k": 500}, "one binarization", "not scored on the same k: 5000 and 500"),
        ({"evaluation__weights": "best"}, "one binarization", "not scored on the same weights: last and best"),
    ],
)
def test_sides_that_were_not_scored_alike_are_refused(
    tmp_path: Path, command: Command, changed: dict[str, object], images: str, why: str
) -> None:
    write(tmp_path, config(), values(85.0))
    write(tmp_path, config(objective="elbo", **changed), values(86.0), names=("one_layer", "elbo"), images=images)
    code, out, err = command(tmp_path, "--compare", "objective=iwae", "objective=elbo")
    assert (code, out, err.count("\n")) == (2, "", 1) and why in err


def test_nothing_finished_is_no_error(runs: Path, command: Command) -> None:
    (bad,) = (path for path in runs.iterdir() if not (path / "result.json").exists())
    for form in ("terminal", "markdown", "csv", "latex", "json"):
        code, out, err = command(bad, "--format", form, "--rows", "model", "--html", runs.parent / "empty.html")
        assert code == 0 and "failed" in out + err
    assert "RunFailed" in (runs.parent / "empty.html").read_text()


def test_every_example_of_the_help_works(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "outputs"
    a = write(place, config(), values(85.0))
    b = write(place, config(objective="elbo"), values(86.0), names=("one_layer", "elbo"))
    sweep = place / "sweeps" / "SWEEP"
    sweep.mkdir(parents=True)
    a.rename(place / "RUN_A")
    b.rename(place / "RUN_B")
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [{"identity": "RUN_A"}]}))
    examples = HELP.split("examples:")[1].split("exit codes")[0].strip().splitlines()
    assert len(examples) > 4
    for line in examples:
        program, *arguments = shlex.split(line.split(">")[0])
        assert program == "iwae-report"
        assert command(*arguments)[0] == 0, line
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_neither_torch_nor_hydra_is_imported(runs: Path) -> None:
    """The whole command, page included, in a process that cannot import them."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'hydra', 'omegaconf', 'wandb']));"
        "from iwae_cli.cli.report import report;"
        f"sys.exit(report([{str(runs)!r}, '--html', 'page.html', '--compare', 'objective=iwae,model=one_layer',"
        "'objective=elbo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
