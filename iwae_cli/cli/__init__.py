"""The commands: iwae-train, iwae-eval, iwae-report."""

import sys

if sys.platform == "win32":
    raise SystemExit("iwae-cli runs on Linux and macOS; on Windows, install it in WSL: wsl --install")
