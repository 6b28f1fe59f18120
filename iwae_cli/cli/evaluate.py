"""The command ``iwae-eval``: evaluate the model of a run folder again, or by another estimator."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from iwae_cli.cli.command import Parser, answer
from iwae_cli.cli.help import evaluate_help, own_folders
from iwae_cli.core.errors import UserError, clip
from iwae_cli.core.files import expanded


def evaluate(argv: Sequence[str] | None = None) -> int:
    """``iwae-eval``; returns the exit code, as ``iwae-train``."""
    return answer("iwae-eval", _evaluate, argv)


def _evaluate(argv: list[str]) -> bool:
    """Return whether anything but standard output was written."""
    parser = Parser("iwae-eval")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-cd", "--config-dir")
    if asked := parser.help_asked(argv):
        print(evaluate_help(own_folders(asked.config_dir)), end="")
        return False
    asked = parser.parse_intermixed_args(argv)
    folder = Path(expanded(asked.folder or ""))
    # An override may come first where the folder was forgotten; the name of a folder may hold = too.
    if asked.folder is None or (re.match("[^/]+=", asked.folder) and not os.path.lexists(folder)):
        raise UserError(f"which run? Write iwae-eval RUN_FOLDER {clip(asked.folder or '', 150)}".rstrip())
    if not os.path.isfile(folder / "config.yaml"):
        problem = "is no run folder (it holds no config.yaml)" if os.path.isdir(folder) else "is not there"
        raise UserError(f"{clip(asked.folder, 150)} {problem}; run folders are in output_dir (default: outputs)")

    from iwae_cli.cli.compose import evaluation_config
    from iwae_cli.config.build import convert

    config = evaluation_config(folder, asked.overrides, asked.config_dir)
    convert(config["data_dir"], str, "data_dir")

    from iwae_cli.runs.evaluate import evaluate_run

    evaluate_run(folder, config)
    return True
