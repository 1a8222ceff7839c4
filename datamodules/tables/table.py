"""A table file -> rows of text, or an error that names file, column and rows. Only pandas, numpy and the standard
library: inference uses it too.

Rows are numbered in messages as a spreadsheet shows them: the header is row 1. Empty lines do not count.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from datamodules.loading.closest import did_you_mean

DELIMITERS = ",;\t|"
WHOLE = re.compile(r"([-+]?)0*(\d+)(\.0*)?", re.ASCII)  # a whole number, as programs spell it: 5, 5.0, 05, +5
SHOWN = 5  # rows, ids or files named in a message; the others are counted


def read_table(path: str | os.PathLike, *, strip: bool = True) -> pd.DataFrame:
    """All cells as text (`001` stays `001`, `NA` stays `NA`, an empty cell is ``), spaces around it stripped (without
    `strip`: of the header alone); rows from 0 on.

    UTF-8 with or without a mark at the start; the delimiter is the one of , ; tab | that splits the header into most
    columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: empty, not UTF-8 (names the byte), a NUL, an open quote, rows with more or fewer fields than the
            header, a column named twice.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        text = _decoded(path, file.read())
    header = text.split("\n", 1)[0]
    delimiter = max(
        DELIMITERS, key=lambda sign: (len(next(csv.reader([header], delimiter=sign), [])), -DELIMITERS.index(sign))
    )
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        first, *rows = [row for row in reader if [cell.strip() for cell in row] not in ([], [""])] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path}: is no table: {error} (a quote that is opened must be closed)") from None
    columns = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(first)]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{path}: columns named more than once: {', '.join(twice)}")
    ragged = [place for place, row in enumerate(rows) if len(row) != len(columns)]
    if ragged:
        fields = sorted({len(rows[place]) for place in ragged})
        raise ValueError(
            f"{path}: {rows_text(ragged)}: {' or '.join(map(str, fields))} fields where the header has {len(columns)} "
            f"(a {delimiter!r} inside a text needs quotes around it)"
        )
    return pd.DataFrame(
        [[cell.strip() for cell in row] for row in rows] if strip else rows, columns=columns, dtype=object
    )


def _decoded(path: str, content: bytes) -> str:
    if not content.strip():
        raise ValueError(f"{path}: the file is empty")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: is UTF-16 (byte 0 to 1); save it as UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}, row {row}; save it as "
            f"UTF-8 (it may be "
            "Latin-1 or a spreadsheet's own encoding)"
        ) from None
    if (place := text.find("\0")) >= 0:
        raise ValueError(f"{path}: a NUL in row {text.count(chr(10), 0, place) + 1}; no text holds one")
    return text.removeprefix("\ufeff")


def whole(text: str) -> str:
    """The plain spelling of a whole number, `5` for 5.0, 05 and +5; any other text as it is."""
    found = WHOLE.fullmatch(text)
    return text if not found else "-" * (found[1] == "-" and found[2] != "0") + found[2]


def plainly(texts: Iterable[str]) -> dict[str, str]:
    """{text: plain spelling} of the whole numbers among the texts of a column, where one of them is spelled in two
    ways, as 1 and 1.0 (a column of whole numbers with a hole becomes one of fractions in pandas); {} where each has one
    spelling, which then stays."""
    plain = {text: whole(text) for text in {*texts} if WHOLE.fullmatch(text)}
    return plain if len({*plain.values()}) < len(plain) else {}


def spelled_twice(plain: dict[str, str]) -> str:
    """`1 and 1.0, 2 and 2.0` of `plainly`: the spellings of each number that has several."""
    of = {
        number: sorted(text for text in plain if plain[text] == number) for number in sorted({*plain.values()}, key=int)
    }
    return listed(" and ".join(texts) for texts in of.values() if len(texts) > 1)


def paired(ids: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """{id: the one of `others` that it is}: the same text, else the same whole number, where neither side has that
    number twice."""
    ids, others = dict.fromkeys(ids), dict.fromkeys(others)
    mine, theirs = Counter(map(whole, ids)), Counter(map(whole, others))
    by_number = {whole(other): other for other in others if WHOLE.fullmatch(other) and theirs[whole(other)] == 1}
    pairs = {
        each: each if each in others else by_number.get(whole(each)) if mine[whole(each)] == 1 else None for each in ids
    }
    return {each: other for each, other in pairs.items() if other is not None}


def rows_text(places: Sequence[int] | np.ndarray) -> str:
    """Positions from 0 on -> `row 4`, `rows 4, 7 and 12`, `rows 2, 3, 4, 5, 6 and 95 more`."""
    shown = [str(int(place) + 2) for place in places[:SHOWN]]
    if len(places) > SHOWN:
        return f"rows {', '.join(shown)} and {len(places) - SHOWN:,} more"
    return f"row {shown[0]}" if len(shown) == 1 else f"rows {', '.join(shown[:-1])} and {shown[-1]}"


def counted(number: int, thing: str) -> str:
    """`1 picture`, `1,200 pictures`."""
    return f"{number:,} {thing}{'s' * bool(number != 1)}"


def listed(words: Iterable[str]) -> str:
    """The first few words by commas, and how many there are beyond."""
    words = list(words)
    return ", ".join(map(str, words[:SHOWN])) + (f" and {len(words) - SHOWN:,} more" if len(words) > SHOWN else "")


def near_miss(name: str, columns: Iterable[str]) -> str:
    """`; did you mean 'Label'?` for the closest column, with all that there are."""
    columns = list(columns)
    return did_you_mean(name, columns, "{!r}", most=1) + f" (there are {', '.join(columns[:30])})"


@dataclass
class Report:
    """Errors of the tables and images of a folder, reported together."""

    where: str
    lines: list[str] = field(default_factory=list)

    def add(self, file: str, text: str) -> None:
        self.lines.append(f"{file}: {text}")

    def rows(
        self,
        file: str,
        column: str,
        wrong: np.ndarray | Sequence[int],
        what: str,
        values: Sequence[str] | np.ndarray = (),
        hint: str = "",
    ) -> None:
        """A line for the rows of a mask, or of positions, of a column; none where no row is wrong. `values` are those
        of all rows, `hint` ends it."""
        wrong = np.asarray(wrong)
        places = np.flatnonzero(wrong) if wrong.dtype == bool else wrong
        if len(places):
            seen = list(dict.fromkeys(str(values[int(place)])[:60] for place in places)) if len(values) else []
            self.add(
                file,
                f"column {column}: {what} in {rows_text(places)}" + f": {listed(map(repr, seen))}" * bool(seen) + hint,
            )

    def finish(self) -> None:
        """Raises ValueError with all lines, where there are any."""
        if self.lines:
            count = f"{len(self.lines)} problems" if len(self.lines) > 1 else "a problem"
            raise ValueError(
                f"{self.where}: {count} (the header is row 1)\n" + "\n".join(f"  {line}" for line in self.lines)
            )
