"""The command ``iwae-report``: finished runs as a table, a page, a paired comparison. Imports neither Hydra nor torch.

What imports numpy is imported where it is used: ``--help`` and wrong options need none of it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from iwae_cli.cli.command import Parser, answer
from iwae_cli.cli.help import conf_folder
from iwae_cli.config.guesses import nearest
from iwae_cli.core.errors import UserError
from iwae_cli.core.files import write_text
from iwae_cli.report.reader import NOT_RECORDED, Found, Run, read
from iwae_cli.report.selection import agrees, choices, comparable, first, known_key, narrowed, typed

if TYPE_CHECKING:
    from iwae_cli.report.cells import Table
    from iwae_cli.report.writers import Report

HELP = """\
iwae-report: finished runs in a table beside the paper's values, as a page, and compared image by image.

usage: iwae-report [PATH ...] [KEY=VALUE ...] [--rows KEYS] [--columns KEYS] [--against A] [--compare A B] [--format F]
                   [--html FILE] [--budget B]

PATH is a folder of runs (default: $IWAE_OUTPUT_DIR or outputs), a sweep folder, or single runs. Run folders are read
and never changed. KEY=VALUE keeps the runs with this choice of a group or value of a key, several choices as seed=0,1,
none as null; keys of evaluation choose among the evaluations of a run. There is one table for every data set and kind
of evaluation (k; weights, precision, binarization, seed). A cell holds the runs that differ by their seed alone: NLL
(mean and standard error over seeds), active units, and the paper's value where data, networks, objective, k and
evaluation are the paper's. Where all runs of a table have refined values (evaluation.refine=all), differences are
between those. Runs that are unfinished, failed or damaged are listed with the reason. Numbers of other estimators
(iwae-eval RUN estimator=ais) follow below the table, run by run. A difference is seen from two standard errors on, over
images and seeds together. A number has as many decimals as its error, which has two digits.

  --rows KEYS, --columns KEYS   comma-separated keys of the configuration (default: model,objective.k and objective); a
                         table without columns has stderr_images, stderr_mc, bias_mc and gap_q beside every NLL
  --split SPLIT          test (default), validation or train
  --format FORMAT        terminal (default), markdown, csv, latex, json; to standard output
  --html FILE            write one page that needs no network: tables, curves, active units, pictures
  --against A            paired difference of every cell from the cell A, in nats, with its standard error over images
                         and over seeds; of several such cells, from the one in the same row or column
  --budget evaluations | seconds   bounds on the validation split at equal training budgets, read from the curves: draws
                         of q scored, or seconds
  --compare A B          paired difference on the same images; each is a run folder, a folder of seeds, or chosen among
                         the runs of PATH; may be given more than once
  A, B and KEY=VALUE are as typed for iwae-train: "objective=iwae objective.k=50" (any key; A and B with several quoted)
  --version, --help, -h

examples:
  iwae-report
  iwae-report outputs schedule=burda evaluation.k=5000
  iwae-report outputs --rows objective.k --columns model
  iwae-report outputs --columns data,objective --format latex > table.tex
  iwae-report outputs --rows objective --against objective=elbo
  iwae-report outputs --rows objective,objective.k --columns= --budget evaluations
  iwae-report outputs --compare "objective=iwae schedule=burda" "objective=elbo schedule=burda"
  iwae-report outputs/RUN_A outputs/RUN_B --compare outputs/RUN_A outputs/RUN_B
  iwae-report outputs/sweeps/SWEEP --html report.html

exit codes: 0 done, 1 the output cannot be written, 2 wrong input
"""


def report(argv: Sequence[str] | None = None) -> int:
    """Run ``iwae-report`` and return the exit code (0 done, 1 not written, 2 wrong input)."""
    return answer("iwae-report", _report, argv)


def _report(argv: list[str]) -> bool:
    """Return False: standard output is what it makes."""
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return False
    options = _parser().parse_intermixed_args(argv)
    if options.html is not None and options.html.is_dir():
        raise UserError(f"--html {options.html} is a folder; name a file, such as {options.html / 'report.html'}")

    from iwae_cli.report.cells import tables
    from iwae_cli.report.paired import compare
    from iwae_cli.report.writers import Report

    filters = [text for text in options.paths if "=" in text and not Path(text).exists()]
    places = [text for text in options.paths if text not in filters]
    found = read(places or [os.environ.get("IWAE_OUTPUT_DIR") or "outputs"])
    if filters:
        _narrow(found, " ".join(filters))
    scored, incomparable = comparable(found.runs, options.split)
    made_tables = _against(options.against, tables(scored, options.rows, options.columns), found)
    if options.budget:
        from iwae_cli.report.budget import at_equal

        made_tables = [at_equal(table, options.budget) for table in made_tables]
    pairs = [compare(a, _chosen(a, found), b, _chosen(b, found), options.split) for a, b in options.compare]
    made = Report(found, [*found.left_out, *incomparable], made_tables, pairs)
    if options.html is not None:
        from iwae_cli.report.page import page  # matplotlib and jinja2 take half a second

        try:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.html, page(made, shlex.join(["iwae-report", *argv]), time.strftime("%Y-%m-%d")))
        except OSError as error:
            raise UserError(f"--html {options.html} cannot be written: {error.strerror}") from None
    _print(made, options.format)
    if options.html is not None:
        print(f"iwae-report: wrote {options.html}", file=sys.stderr)
    return False


def _narrow(found: Found, text: str) -> None:
    """Keep the finished runs, and of these the evaluations, that have the values of ``text``."""
    wanted = _wanted("filter", text, found)
    kept = narrowed(found.runs, wanted)
    if not kept:
        raise UserError(f"{text}: no finished run is that{_values(wanted, found)}")
    if others := len(found.runs) - len(kept):
        found.notes.append(f"{others} finished run{'s' * (others > 1)} without {text}")
    for key in wanted:
        if unknown := sum(score.keys.get(key) == NOT_RECORDED for run in found.runs for score in run.scores):
            found.notes.append(f"{unknown} evaluation{'s' * (unknown > 1)} left out, of which {key} is {NOT_RECORDED}")
    found.runs = kept


def _print(made: Report, form: str) -> None:
    from iwae_cli.report import writers

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    write: dict[str, Callable[[Report], str]] = {
        "terminal": lambda made: writers.terminal(made, width),
        "markdown": writers.markdown,
        "csv": writers.comma_separated,
        "latex": writers.latex,
        "json": writers.json_text,
    }
    print(write[form](made), end="")
    if form == "csv":
        # A program reads the table; a person should still see what is not in it.
        print("".join(f"{line}\n" for line in made.below()), file=sys.stderr, end="")


def _against(text: str | None, made: list[Table], found: Found) -> list[Table]:
    """Return the tables with the differences of ``--against``."""
    if text is None:
        return made
    from iwae_cli.report.cells import against

    wanted = _wanted("--against", text, found)
    compared = [against(table, wanted, text) for table in made]
    if not any(compared):
        raise UserError(f"--against {text}: no cell of a table is that{_values(wanted, found)}")
    return [new or table for new, table in zip(compared, made, strict=True)]


def _chosen(text: str, found: Found) -> list[Run]:
    """Return the finished runs that one side of ``--compare`` names."""
    if Path(text).exists():
        there = read([text])
        if not there.runs:
            raise UserError(f"--compare {text}: no finished run; {there.left_out[0].state}, {there.left_out[0].why}")
        return there.runs
    wanted = _wanted("--compare", text, found)
    runs = narrowed(found.runs, wanted)
    if not runs:
        raise UserError(f"--compare {text}: no finished run is that{_values(wanted, found)}")
    return runs


def _wanted(option: str, text: str, found: Found) -> dict[str, str]:
    """Return keys and values of ``"KEY=VALUE KEY=VALUE"``; a comma separates them too."""
    # Not inside a value: model.latent_sizes=[100, 50].
    parts = [part.partition("=") for part in re.split(r"[,\s]+(?=[^\s,=\[\]]+=)", text.strip())]
    if not all(key and sign for key, sign, _ in parts):
        raise UserError(f"{option} {text} is neither a folder nor KEY=VALUE, such as objective=elbo")
    wanted = {known_key(key, found.runs): value for key, _, value in parts}
    if len(wanted) < len(parts):
        raise UserError(f"{option} {text}: a key is there twice; write several choices as seed=0,1")
    wanted = {key: _named_data(value, found) if key == "data" else value for key, value in wanted.items()}
    held = _held(found)
    for key, value in wanted.items():
        whole = any(typed(of.get(key)) == value for of in held)  # a name may hold a comma
        for choice in () if whole else choices(value):
            if not any(agrees(of, {key: choice}) for of in held):
                raise UserError(f"{option} {text}: no finished run is that{_values({key: choice}, found)}")
    return wanted


def _named_data(value: str, found: Found) -> str:
    """Return the names of data sets for those and for choices of the group ``data``, whose names no result holds."""
    own = {str(run.config.get("config_dir") or "") for run in found.runs} - {""}
    names: dict[str, None] = {}
    for choice in choices(value):
        targets = set()
        for folder in (conf_folder(), *map(Path, sorted(own))) if re.fullmatch(r"\w{1,100}", choice) else ():
            with suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # a user's file may hold anything
                node = yaml.safe_load((folder / "data" / f"{choice}.yaml").read_text(encoding="utf-8"))
                targets.add(node["_target_"])
        chosen = [run.dataset for run in found.runs if run.dataset == choice or run.keys["data._target_"] in targets]
        names |= dict.fromkeys(chosen or [choice])
    return ",".join(names)


def _held(found: Found) -> list[dict[str, Any]]:
    return [{**run.keys, **score.keys} for run in found.runs for score in run.scores]


def _values(keys: Mapping[str, str], found: Found) -> str:
    """Return the values that the runs have of these keys, for a message; of a value that none has the nearest."""
    held = _held(found)
    words = ""
    for key, value in keys.items():
        there = sorted({typed(of.get(key)) for of in held})
        hint = "" if any(agrees(of, {key: value}) for of in held) else nearest(value, there, f"{key}=")
        words += f"; {key} is {first(there)}{hint}"
    return words


def _parser() -> Parser:
    parser = Parser("iwae-report")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--rows", type=_keys)
    parser.add_argument("--columns", type=_keys)
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test")
    parser.add_argument("--format", choices=["terminal", "markdown", "csv", "latex", "json"], default="terminal")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--against")
    parser.add_argument("--budget", choices=["evaluations", "seconds"])
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar=("A", "B"))
    return parser


def _keys(text: str) -> list[str]:
    return list(dict.fromkeys(key.strip() for key in text.split(",") if key.strip()))


if __name__ == "__main__":
    sys.exit(report())
