"""Evaluations with refined proposals: what the tables show and what the paired differences compare."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import Command, change, config, evaluate, values, write
from small_runs import TINY, finished

N = 40
REFINE = "iwae-eval RUN evaluation.refine=all"
AGAINST = ("--rows", "objective", "--against", "objective=elbo")
COMPARE = ("--compare", "objective=iwae", "objective=elbo")
NAMES = {name: ("one_layer", name) for name in ("iwae", "elbo")}
BY_Q = {"iwae": values(85.2, N, 1), "elbo": values(85.0, N, 2)}
GAPS = {name: 0.9 + shift + 0.1 * values(0.0, N, seed) for name, shift, seed in (("iwae", 0.3, 3), ("elbo", -0.2, 4))}
REFINED = {name: BY_Q[name] + GAPS[name] for name in BY_Q}
"""By q the ELBO is better by 0.2 nats, by the refined proposals the IWAE by 0.3."""


def written(place: Path, name: str, seed: int = 0, images: int = N, shift: float = 0.0, **options: Any) -> Path:
    """Write a run, the first images of which have refined values."""
    refined = REFINED[name][:images] + shift if images else None
    settings = config(objective=name, seed=seed)
    return write(place, settings, BY_Q[name] + shift, names=NAMES[name], refined=refined, **options)


def read(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command(*arguments, "--format", "json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=pytest.fail)  # type: ignore[no-any-return]


def cells(value: dict[str, Any]) -> dict[str, Any]:
    (table,) = value["tables"]
    return {cell["keys"]["objective"]: cell for cell in table["cells"]}


def test_the_gap_stands_beside_the_number_of_the_paper(tmp_path: Path, command: Command) -> None:
    """Measured on the first images of two seeds, on the first images of another run, and missing in an older one."""
    for seed, shift in enumerate((0.0, 0.4)):
        written(tmp_path, "iwae", seed, images=10 + seed * 10, shift=shift)
    written(tmp_path, "elbo", images=10)
    write(tmp_path, config("one_layer", "vr"), values(86.0, N), names=("one_layer", "vr"))
    found = cells(read(command, tmp_path))
    parts = [GAPS["iwae"][:n] for n in (10, 20)]
    gap = np.mean([part.mean() for part in parts])
    error = np.mean([part.std(ddof=1) / len(part) ** 0.5 for part in parts])
    assert (found["iwae"]["gap_q"], found["iwae"]["gap_q_stderr"]) == pytest.approx((gap, error))
    assert found["iwae"]["nll"] == pytest.approx(85.0) and found["iwae"]["refined"] is None
    assert found["vr"]["gap_q"] is None
    images = [run["refined"] and run["refined"]["n"] for cell in found.values() for run in cell["runs"]]
    assert images == [10, 10, 20, None]

    lines = [" ".join(line.split()) for line in command(tmp_path, "--rows", "objective")[1].splitlines()]
    assert any(line.startswith("objective NLL_5000 gap_q seeds ") for line in lines)
    rows = {line.split()[0]: line for line in lines if line.startswith(("elbo ", "iwae ", "vr "))}
    assert rows["iwae"].startswith(f"iwae 85.00 ± 0.20 {gap:.3f} ± {error:.3f} 2 ") and "±" not in rows["vr"]
    least, most = sorted(part.mean() for part in (*parts, GAPS["elbo"][:10]))[::2]
    note = f"gap_q: NLL_5000, by the trained q, is too high by at least so much, {least:.3f} to {most:.3f} nats by run"
    assert any(line.startswith(note) and "10 to 20 images" in line for line in lines)
    grid = command(tmp_path)[1]
    assert note in grid and "gap_q" not in grid[: grid.index("NLL_5000 in nats")], "no column for every column"
    written_as = list(csv.DictReader(io.StringIO(command(tmp_path, "--format", "csv")[1])))
    gaps = {row["objective"]: row["gap_q"] for row in written_as}
    assert float(gaps["iwae"]) == pytest.approx(gap) and gaps["vr"] == ""
    assert {row["refined_nll"] for row in written_as} == {""}
    below = {"names": NAMES["iwae"], "refined": BY_Q["iwae"][:5] - 0.1}
    write(tmp_path / "below", config(objective="iwae"), BY_Q["iwae"], **below)
    out = command(tmp_path / "below", "--rows", "objective")[1]
    assert "  none seen ± 0.0" in out and "by at least so much, 0.000 nats by run; measured on 5 images" in out


def test_a_gap_that_not_all_seeds_have_is_said_to_be_of_some(tmp_path: Path, command: Command) -> None:
    """The column is empty, as the mean over seeds is not known."""
    for seed, images in enumerate((5, 0)):
        written(tmp_path, "iwae", seed, images=images)
    size = GAPS["iwae"][:5].mean()
    assert f"so much, {size:.3f} nats by run, of 1 of 2 runs; measured on 5 images" in command(tmp_path)[1]


def test_differences_are_of_refined_values_where_all_runs_have_them(tmp_path: Path, command: Command) -> None:
    """Over two seeds of either side, the second 0.1 higher; the sign is not that by q."""
    for name in NAMES:
        for seed in range(2):
            written(tmp_path, name, seed, shift=seed / 10)
    value = read(command, tmp_path, *AGAINST, *COMPARE)
    found, gain = cells(value), REFINED["iwae"] - REFINED["elbo"]
    for paired in (found["iwae"]["against"], *value["comparisons"]):
        assert paired["difference"] == pytest.approx(gain.mean()) == pytest.approx(0.3)
        assert paired["stderr_images"] == pytest.approx(gain.std(ddof=1) / N**0.5)
        assert paired["stderr_seeds"] == pytest.approx(0.005**0.5)
        assert (paired["wins_a"], paired["wins_b"]) == ((gain > 0).sum(), (gain < 0).sum())
        assert (paired["by"], paired["bias_mc"], paired["unrefined"]) == ("the refined proposals", -0.0005, "")
        assert [caution[:13] for caution in paired["cautions"]] == ["fewer than 3 "]
    for name, cell in found.items():
        assert cell["nll"] == pytest.approx(-BY_Q[name].mean() - 0.05) and cell["bias_mc"] == -0.002
        assert cell["refined"]["nll"] == pytest.approx(-REFINED[name].mean() - 0.05)
        assert cell["refined"]["stderr_seeds"] == pytest.approx(0.05) and cell["refined"]["bias_mc"] == -0.0005

    shown = f"{-REFINED['iwae'].mean() - 0.05:.3f} ± 0.050"
    page = tmp_path / "page.html"
    for form in ("terminal", "markdown", "latex"):
        plus_minus = "$pm$" if form == "latex" else "±"
        out = command(tmp_path, *AGAINST, *COMPARE, "--format", form, "--html", page)[1].replace("\\", "")
        assert "refined NLL_5000" in out and shown.replace("±", plus_minus) in out and "+0.30" in out and "‡" not in out
        assert "than there by the refined proposals" in out and "log p(x) by the refined proposals, paired on" in out
        assert "the paper's values compare with NLL_5000, by the trained q" in out
    text = page.read_text()
    assert "than there by the refined proposals" in text and shown.partition(" ")[0] in text
    rows = list(csv.DictReader(io.StringIO(command(tmp_path, *AGAINST, "--format", "csv")[1])))
    assert [row["difference_by"] for row in rows] == ["", "the refined proposals"]
    assert float(rows[1]["refined_nll"]) == found["iwae"]["refined"]["nll"]
    assert shown in command(tmp_path)[1], "in the grid too"


def test_fits_of_an_earlier_version_are_read_and_said(tmp_path: Path, command: Command) -> None:
    """Their bias is another one; the line says what to type for new ones."""
    old = written(tmp_path, "elbo", recipe=1)
    written(tmp_path, "iwae")
    assert len(cells(read(command, tmp_path, "evaluation.refine=all"))) == 2
    said = f"{old.name} are those of an earlier version, which fits worse: iwae-eval RUN evaluation.refine=all"
    code, out, _ = command(tmp_path, "evaluation.refine=all", *COMPARE)
    assert code == 0 and len(re.findall(rf"{said}$", out, re.M)) == 2, out
    evaluate(old, config(objective="elbo"), BY_Q["elbo"], "new", names=NAMES["elbo"], refined=REFINED["elbo"])
    assert "earlier version" not in command(tmp_path, *COMPARE)[1]


def test_one_run_without_refined_values_keeps_a_table_by_q(tmp_path: Path, command: Command) -> None:
    """Named with the command that refines it, or with the reason why nothing does."""
    written(tmp_path, "iwae")
    lacking = [written(tmp_path, "elbo", images=10), written(tmp_path, "elbo", 1, images=0, no_gap="discrete latents")]
    value = read(command, tmp_path, *AGAINST, *COMPARE)
    gain = BY_Q["iwae"] - BY_Q["elbo"]
    words = f"no refined values of {lacking[0].name}: {REFINE}; "
    words += f"no refined values of {lacking[1].name}: discrete latents"
    for paired in (cells(value)["iwae"]["against"], *value["comparisons"]):
        assert paired["difference"] == pytest.approx(gain.mean()) == pytest.approx(-0.2)
        assert (paired["by"], paired["bias_mc"]) == ("the trained q", -0.002)
        assert (paired["wins_a"], paired["wins_b"]) == ((gain > 0).sum(), (gain < 0).sum())
        assert paired["unrefined"] == words
    assert f"compared by the trained q: {words}" in value["tables"][0]["notes"]
    out = command(tmp_path, *AGAINST, *COMPARE)[1]
    assert "than there by the trained q" in out and "refined NLL" not in out
    assert out.count(f"{lacking[0].name}: {REFINE}") == 2, "below the table and the comparison"


def test_a_table_is_compared_in_one_way(tmp_path: Path, command: Command) -> None:
    """By q where a third cell has no refined values; a comparison of two sides that have them is by those."""
    for name in NAMES:
        written(tmp_path, name)
    third = write(tmp_path, config("one_layer", "vr"), values(86.0, N), names=("one_layer", "vr"))
    value = read(command, tmp_path, *AGAINST, *COMPARE)
    assert [cells(value)[name]["against"]["by"] for name in ("iwae", "vr")] == ["the trained q"] * 2
    assert cells(value)["iwae"]["against"]["difference"] == pytest.approx(-0.2)
    assert value["comparisons"][0]["difference"] == pytest.approx(0.3)
    assert value["tables"][0]["notes"] == [f"compared by the trained q: no refined values of {third.name}: {REFINE}"]


def test_the_refined_one_of_several_evaluations_counts(tmp_path: Path, command: Command) -> None:
    """As after iwae-eval RUN evaluation.refine=all; runs with either evaluation stay in one table."""
    runs = {name: written(tmp_path, name, images=10) for name in NAMES}
    by_q = read(command, tmp_path, *AGAINST, *COMPARE)
    evaluate(runs["iwae"], config(), BY_Q["iwae"], "all", names=NAMES["iwae"], refined=REFINED["iwae"])
    mixed = read(command, tmp_path, *AGAINST, *COMPARE)
    options: dict[str, Any] = {"names": NAMES["elbo"], "refined": REFINED["elbo"]}
    evaluate(runs["elbo"], config(objective="elbo"), BY_Q["elbo"], "all", **options)
    whole = read(command, tmp_path, *AGAINST, *COMPARE)
    for value, difference in ((by_q, -0.2), (mixed, -0.2), (whole, 0.3)):
        assert not value["left_out"] and len(cells(value)) == 2
        for paired in (cells(value)["iwae"]["against"], *value["comparisons"]):
            assert paired["difference"] == pytest.approx(difference)
    assert cells(mixed)["iwae"]["refined"] is not None
    (note,) = mixed["tables"][0]["notes"]
    assert note == f"compared by the trained q: no refined values of {runs['elbo'].name}: {REFINE}"


def test_evaluations_under_different_seeds_are_never_mixed(tmp_path: Path, command: Command) -> None:
    """One run has refined values under another seed: a table and a comparison are by the seed that all have."""
    runs = [write(tmp_path, config(seed=seed), BY_Q["iwae"]) for seed in range(2)]
    other = config(evaluation__seed=7)
    evaluate(runs[0], other, BY_Q["iwae"] + 5.0, "seeded", refined=REFINED["iwae"][:3])
    both, single = sorted(read(command, tmp_path)["tables"], key=lambda made: -len(made["cells"][0]["runs"]))
    assert both["cells"][0]["nll"] == pytest.approx(85.2) and both["cells"][0]["seeds"] == [0, 1]
    assert single["cells"][0]["nll"] == pytest.approx(80.2) and single["cells"][0]["seeds"] == [0]
    out = command(tmp_path)[1]
    assert "k = 5000, evaluation seed 0\n" in out and "k = 5000, evaluation seed 7\n" in out
    (paired,) = read(command, tmp_path, "--compare", "seed=0", "seed=1")["comparisons"]
    assert paired["difference"] == pytest.approx(0.0)
    for arguments in (("evaluation.seed=7",), ("--rows", "evaluation.seed")):
        (one,) = read(command, tmp_path, *arguments)["tables"]
        assert min(cell["nll"] for cell in one["cells"]) == pytest.approx(80.2)
    write(tmp_path, config(objective="elbo", evaluation__seed=3), BY_Q["elbo"], names=NAMES["elbo"])
    err = command(tmp_path, *COMPARE)[2]
    assert "not scored on the same evaluation seed: 0 and 3; evaluate both alike with iwae-eval" in err


def test_a_command_has_the_options_that_the_run_would_not_take(tmp_path: Path, command: Command) -> None:
    """The evaluation at k = 5,000 that both share is not the one that the ELBO's configuration asks for."""
    written(tmp_path, "iwae")
    small = write(tmp_path, config(objective="elbo", evaluation__k=500), values(85.5, N), names=NAMES["elbo"])
    evaluate(small, config(objective="elbo"), BY_Q["elbo"], "k5000", names=NAMES["elbo"])
    (paired,) = read(command, tmp_path, *COMPARE)["comparisons"]
    assert paired["unrefined"] == f"no refined values of {small.name}: {REFINE} evaluation.k=5000"


@pytest.mark.parametrize(
    ("images", "gap", "mark"),
    [
        (10, 0.25, "inside gap_q (0.25 nats of A, 0.05 nats of B): a better fit of the trained q may be all of it; "),
        (10, 0.15, None),
        (0, 0.0, None),
    ],
)
def test_a_difference_inside_the_gap_has_a_caution(
    tmp_path: Path, command: Command, images: int, gap: float, mark: str | None
) -> None:
    """The difference by q is 0.2 nats, a hundred times the bias of 0.002."""
    noise = 0.01 * values(0.0, N, 5)[:images]
    made = []
    for name, size in (("iwae", gap), ("elbo", 0.05)):
        refined = BY_Q[name][:images] + size + noise - noise.mean() if images else None
        made.append(write(tmp_path, config(objective=name), BY_Q[name], names=NAMES[name], refined=refined))
    value = read(command, tmp_path, *AGAINST, *COMPARE)
    expected = [f"{mark}evaluation.refine=all or estimator=ais tells p and q apart"] if mark else []
    advice = [f"; no refined values of {made[0].name}, {made[1].name}: {REFINE}"] if mark else []
    for paired in (cells(value)["iwae"]["against"], *value["comparisons"]):
        assert paired["cautions"][1:] == ["".join(expected + advice)] * len(expected)
    out = command(tmp_path, *AGAINST)[1]
    assert ("-0.20‡" in out and "‡ inside gap_q: a better fit of the trained q" in out) is bool(mark)


def test_a_gap_that_one_side_knows_is_a_caution_too(tmp_path: Path, command: Command) -> None:
    written(tmp_path, "iwae", images=10)
    write(tmp_path, config(objective="elbo"), BY_Q["elbo"], names=NAMES["elbo"])
    (paired,) = read(command, tmp_path, *COMPARE)["comparisons"]
    (caution,) = [text for text in paired["cautions"] if "inside gap_q" in text]
    assert "nats of A, unknown of B" in caution


def test_one_image_is_not_compared(tmp_path: Path, command: Command) -> None:
    for name in NAMES:
        finished(tmp_path, *TINY, f"objective={name}", "evaluation.images=1", "evaluation.refine=0")
    code, _, err = command(tmp_path, *COMPARE)
    assert code == 2 and err.count("\n") == 1 and "is of one image" in err and "evaluation.images=null" in err


def test_another_split_has_arrays_of_its_own(tmp_path: Path, command: Command) -> None:
    for name in NAMES:
        folder = written(tmp_path, name)
        result = json.loads((folder / "result.json").read_text())
        hashes = {"evaluation_sha256": {"validation": "0" * 64}}
        moved = {"test": None, "validation": result["test"], "dataset": result["dataset"] | hashes}
        change(folder / "result.json", **moved)
        with np.load(folder / "log_likelihood.npz") as file:
            arrays = {f"validation_{key}": file[key] for key in file.files}
        np.savez(folder / "log_likelihood.npz", **arrays)
    (paired,) = read(command, tmp_path, "--split", "validation", *COMPARE)["comparisons"]
    assert paired["difference"] == pytest.approx(0.3) and paired["by"] == "the refined proposals"


DAMAGES: dict[str, Callable[[Path, dict[str, np.ndarray], str], Any]] = {
    "no file": lambda path, held, name: path.unlink(),
    "cut": lambda path, held, name: path.write_bytes(path.read_bytes()[:100]),
    "no archive": lambda path, held, name: path.write_bytes(zipfile.ZipFile(path).read(f"{name}.npy")),
    "no array": lambda path, held, name: np.savez(path, ess=held[name]),
    "short": lambda path, held, name: np.savez(path, **{**held, name: held[name][:-1]}),
    "not finite": lambda path, held, name: np.savez(path, **{**held, name: np.append(held[name][:-1], np.nan)}),
    "words": lambda path, held, name: np.savez(path, **{**held, name: np.full(N, "small")}),
    "other evaluation": lambda path, held, name: np.savez(path, **{**held, name: held[name] + 1e-3}),
}


@pytest.mark.parametrize("images", [0, N], ids=["by q", "refined"])
def test_damaged_values_are_one_line(tmp_path: Path, command: Command, images: int) -> None:
    for how, damage in DAMAGES.items():
        path = written(tmp_path / how, "iwae", images=images) / "log_likelihood.npz"
        written(tmp_path / how, "elbo", images=images)
        held = {"log_px": BY_Q["iwae"], "refined_log_px": REFINED["iwae"]}
        name = "refined_log_px" if images else "log_px"
        damage(path, held, name)
        code, out, err = command(tmp_path / how, *COMPARE)
        assert (code, out, err.count("\n")) == (2, "", 1) and "log_likelihood.npz is " in err, how
        assert how in ("no file", "other evaluation") or f" {name}" in err, err
