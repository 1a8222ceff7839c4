"""Errors of a wrong command line."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from datamodules.loading.closest import did_you_mean

CLOSED = 141  # 128 + SIGPIPE, as shells say
NOTES_PRINTED = "VITLAB_NOTES_PRINTED"  # in the environment of a fold: the parent has printed the notes


class UsageError(ValueError):
    """A wrong command line or config file; the message is printed for the user."""


class Parser(argparse.ArgumentParser):
    """Parser of a verb that prints one line for a mistake and names the closest flags."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            message = (
                f"unknown flag {unknown[1]}{did_you_mean(unknown[1], flags)} (--help lists them all)"
                if unknown[1].startswith("-")
                else f"{unknown[1]}: one word too many (--help tells what it takes)"
            )
        message = re.sub(
            r"invalid choice: (.*) \(choose from (.*)\)", r"invalid choice \1: one of \2", message
        ).replace("'", "")
        print(
            f"{self.prog}: {message.removeprefix('argument ')}".replace(
                "the following arguments are required:", "missing:"
            ),
            file=sys.stderr,
        )
        raise SystemExit(2)


def invocation(verb: str) -> str:
    """The command that starts another verb, in the form in which this one was started: console command or file."""
    script = Path(sys.argv[0])
    folder = script.parent if script.parent.name == "experiments" else Path("experiments")
    if script.stem == "vitlab" or script == folder / "__main__.py":
        return f"vitlab {verb}"
    return f"python {folder / verb}.py"


def piped(main: Callable[..., int], *args: Any) -> int:
    """Run a verb; end silently where its output is closed, as behind `| head`. Returns the exit code."""
    try:
        try:
            code = main(*args)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its end
        code = CLOSED
    return code


def dispatch(prog: str, verbs: dict[str, Callable[[list[str]], int]], argv: list[str]) -> int:
    """Run the verb that the first word names, or print what there are. Returns the exit code."""
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print(
            f"usage: {prog} VERB ... (VERB --help tells its flags)\n\n"
            + "\n".join(f"{name:<12}{do.__doc__}" for name, do in verbs.items())
        )
        return 0
    if verb not in verbs:
        print(
            f"{prog}: there is no {verb!r}{did_you_mean(verb, [*verbs])} (there are {', '.join(verbs)})",
            file=sys.stderr,
        )
        return 2
    return verbs[verb](rest)


def positive(text: str, least: int = 1) -> int:
    """A flag's whole number from `least` on, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} on")
    return int(text)
