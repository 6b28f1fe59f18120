"""What the commands share: their parser, and errors that end in one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from iwae_cli import __version__
from iwae_cli.cli.stdio import forgiving
from iwae_cli.config.guesses import nearest, question
from iwae_cli.core.errors import Interrupted, UserError, clip, hide_nothing, one_line
from iwae_cli.core.files import here
from iwae_cli.sweeps.records import Stopped


def answer(program: str, work: Callable[[list[str]], bool], argv: Sequence[str] | None) -> int:
    """Return the exit code of ``work``, which returns whether it wrote anything but standard output."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    hide_nothing()
    with forgiving() as out:
        try:
            here()
            wrote = work(arguments)
        except (UserError, Interrupted) as error:
            print(one_line(f"{program}: {error}"), file=sys.stderr)
            return error.exit_code
        except Stopped as stop:
            return stop.exit_code
        except KeyboardInterrupt:
            return 130
        out.flush()
        if out.lost is None:
            return 0
        reader_left = isinstance(out.lost, BrokenPipeError)
        if not reader_left:
            print(f"{program}: standard output cannot be written: {out.lost.strerror}", file=sys.stderr)
        if wrote:
            return 0
        return 141 if reader_left else 1  # 141 is how shells report a broken pipe


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ``UserError``, with the nearest option."""

    def __init__(self, program: str) -> None:
        super().__init__(program, add_help=False, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"{program} {__version__}")

    def help_asked(self, argv: list[str]) -> argparse.Namespace | None:
        """Return the other arguments, without a check, if help is asked for."""
        others = [argument for argument in argv if argument not in ("-h", "--help")]
        return None if others == argv else self.parse_known_args(others)[0]

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse; unknown options get the nearest one, or the override that they mean."""
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            option, equals, value = unknown[0].partition("=")
            after = [] if equals else args[args.index(unknown[0]) + 1 :][:1]
            value = value or "".join(word for word in after if not word.startswith("-") and "=" not in word)
            hint = nearest(option, [name for name in self._option_string_actions if name.startswith("--")])
            hint = hint or (question(self.overrides_like(option.lstrip("-"), value)) if value else "")
            raise UserError(f"unknown option {clip(unknown[0])}{hint or ' (an override is KEY=VALUE, without dashes)'}")
        return parsed

    def overrides_like(self, key: str, value: str) -> list[str]:
        """Return the overrides that the option ``--key=value`` may mean."""
        return [f"{key}={clip(value)}"]

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as a UserError."""
        raise UserError(message)
