"""What the commands share: their parser, and errors that end in one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from iwae_cli import __version__
from iwae_cli.cli.stdio import exit_code, forgiving
from iwae_cli.config.build import nearest, one_line
from iwae_cli.core.errors import Interrupted, UserError
from iwae_cli.core.files import here
from iwae_cli.sweeps.sweep import Stopped


def answer(program: str, work: Callable[[], bool]) -> int:
    """Return the exit code of ``work``, which returns whether it wrote anything but standard output."""
    with forgiving() as out:
        try:
            here()
            wrote = work()
        except (UserError, Interrupted) as error:
            print(f"{program}: {one_line(error)}", file=sys.stderr)
            return error.exit_code
        except Stopped as stop:
            return stop.exit_code
        except KeyboardInterrupt:
            return 130
        return exit_code(program, out, needed=not wrote)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ``UserError``, with the nearest option."""

    def __init__(self, program: str) -> None:
        super().__init__(program, add_help=False, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"{program} {__version__}")

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse; unknown options get the nearest one."""
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            hint = nearest(unknown[0], options)
            if "=" in unknown[0] and not hint:
                hint = f"; did you mean {unknown[0].lstrip('-')}?"
            raise UserError(f"unknown option {unknown[0]}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as a UserError."""
        raise UserError(message)
