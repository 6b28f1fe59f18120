"""Run the commands that `<!-- Output of ... -->` names in README and docs, and replace the code block below."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- Output of iwae-train(.*?) -->\n```\n).*?^```$", re.DOTALL | re.MULTILINE)


def output(arguments: str) -> str:
    """Return what `iwae-train` prints in an empty folder; of a sweep only the table at its end."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("IWAE_", "WANDB_"))}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "iwae_cli", *shlex.split(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        text = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True
        ).stdout
    text = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return text.rpartition("\n\n")[2] if " -m " in arguments else text


if __name__ == "__main__":
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda found: f"{found[1]}{output(found[2])}\n```", text), encoding="utf-8")
