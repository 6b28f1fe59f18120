"""Run `iwae-train` in an empty folder and put the table that it prints into README.md."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
MARK = "<!-- Output of iwae-train; tests/support/regenerate_readme.py writes it. -->\n"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "iwae_cli"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    table = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
    before, _, after = README.read_text(encoding="utf-8").partition(MARK)
    rest = re.sub(r"^```\n.*?^```\n", "", after, count=1, flags=re.DOTALL | re.MULTILINE)
    README.write_text(f"{before}{MARK}```\n{table}\n```\n{rest}", encoding="utf-8")
