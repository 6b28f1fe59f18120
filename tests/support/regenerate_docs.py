"""Run the commands that `<!-- Output of ... -->` names in README and docs, and replace the code block below.

Likewise run the cells of the notebook.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from iwae_cli.cli.help import choices, conf_folder, summary

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = "import sys; from iwae_cli.cli.evaluate import evaluate; sys.exit(evaluate())"
NOTEBOOK = ROOT / "docs" / "python.ipynb"
GROUPS = re.compile(r"(?<=<!-- The groups of conf -->\n).*?\n(?=\n)", re.DOTALL)
BLOCK = re.compile(r"(<!-- Output of iwae-(train|eval)(.*?) -->\n```\n).*?^```$", re.DOTALL | re.MULTILINE)


def environment() -> dict[str, str]:
    """Return the variables of this process without those that a run reads; figures are drawn where they are shown."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("IWAE_", "WANDB_", "MPLBACKEND"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def executed(folder: str | Path, env: dict[str, str]) -> Any:
    """Return the notebook with what its cells print and draw in a folder; a cell that raises is an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = {"timeout": 300, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings)
    client.execute(env=env)
    return notebook


def output(program: str, arguments: str) -> str:
    """Return what `iwae-train` prints in an empty folder, or `iwae-eval` of a run."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            line = [sys.executable, *command]
            return subprocess.run(
                line, cwd=folder, env=environment(), stdout=subprocess.PIPE, encoding="utf-8", check=True
            ).stdout

        text = run("-m", "iwae_cli", *(shlex.split(arguments) if program == "train" else ()))
        if program == "eval":
            text = run("-c", EVALUATE, *glob("outputs/*", root_dir=folder), *shlex.split(arguments))
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def groups() -> str:
    """Return the table of the groups in conf/, in the order of config.yaml and with its comments."""
    found = choices([conf_folder()])
    lines = ["| group | choices (default in bold) | |", "|---|---|---|"]
    text = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    for group, chosen, words in re.findall(r"^  - (\w+): (\w+) # (.*)$", text, re.MULTILINE):
        names = [f"**{name}**" if name == chosen else name for name in summary(found[group])]
        linked = re.sub(r"docs/\S+", lambda page: f"[{page[0].partition('#')[0]}]({page[0]})", words)
        lines.append(f"| `{group}=` | {', '.join(names)} | {linked} |")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(GROUPS.sub(lambda _: groups(), readme.read_text(encoding="utf-8")), encoding="utf-8")
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda found: f"{found[1]}{output(found[2], found[3])}\n```", text), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(folder, environment()), NOTEBOOK)
