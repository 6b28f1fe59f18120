"""Run `iwae-train` in an empty folder and put the table that it prints into README.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
MARK = "<!-- Output of iwae-train; tests/support/regenerate_readme.py writes it. -->\n"

if __name__ == "__main__":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("IWAE_", "WANDB_"))}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "iwae_cli"]
    with tempfile.TemporaryDirectory() as folder:
        table = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True
        ).stdout
    table = "\n".join(line.rstrip() for line in table.strip().splitlines())
    before, _, after = README.read_text(encoding="utf-8").partition(MARK)
    rest = re.sub(r"^```\n.*?^```\n", "", after, count=1, flags=re.DOTALL | re.MULTILINE)
    README.write_text(f"{before}{MARK}```\n{table}\n```\n{rest}", encoding="utf-8")
