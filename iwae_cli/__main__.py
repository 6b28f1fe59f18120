"""``python -m iwae_cli`` is ``iwae-train``."""

from __future__ import annotations

import sys

from iwae_cli.cli.train import train

if __name__ == "__main__":
    sys.exit(train())
