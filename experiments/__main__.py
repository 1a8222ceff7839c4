"""The console command of an installed copy: `vitlab VERB ...` is `python experiments/VERB.py ...`."""

import ast
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from datamodules.loading.closest import did_you_mean
from experiments.cli.errors import piped
from experiments.cli.registered import summary

USAGE = "usage: vitlab VERB ...   (vitlab VERB --help prints its flags; vitlab --version)"


def verbs() -> dict[str, Path]:
    """Verb -> its file: the files beside this one that also run as scripts."""
    files = (file for file in Path(__file__).parent.glob("*.py") if file != Path(__file__))
    return {
        file.stem: file for file in sorted(files) if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8")
    }


def main(argv: list[str] | None = None) -> int:
    """Run the verb that the first word names. Returns its exit code, 2 for a word that is no verb."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        firsts = {
            name: summary(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
            for name, file in verbs().items()
        }
        print("\n".join([USAGE, "", *(f"{name:<11}{first.split(': python')[0]}" for name, first in firsts.items())]))
        return 0
    if verb == "--version":
        print(f"vitlab {version('vitlab')}")
        return 0
    if verb not in verbs():
        print(
            f"vitlab: there is no verb {verb!r}{did_you_mean(verb, [*verbs()])} (there are {', '.join(verbs())})",
            file=sys.stderr,
        )
        return 2
    return piped(import_module(f"experiments.{verb}").main, rest)


if __name__ == "__main__":
    sys.exit(main())
