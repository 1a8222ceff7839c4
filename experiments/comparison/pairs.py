"""Better, worse or noise: groups of runs compared two by two, over the rows that both predicted and over their seeds.

Over rows: the bootstrap of the difference (2,000 draws, the same for both sides). It says whether these networks would
keep their order on other pictures. Over seeds: Welch's. It says whether other seeds would keep it. With both, the two
half-widths are added as squares: the seeds' is that on these rows, and the draws hold the networks fixed.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

import numpy as np

from experiments.comparison.record import Record, number
from experiments.comparison.row_scores import DRAWS, FILES, SEED, Rows, bootstrap, of_means, parts, read_rows, score
from experiments.comparison.tables import Comparison, Group
from lightning_modules.loggers.formats import in_percent

BETTER, NOISE, WORSE, UNKNOWN = "better", "noise", "worse", "unknown"
LEVEL, Z = 0.95, NormalDist().inv_cdf(0.975)
SAME = 2e-3  # of a metric worked out from rows and the run's own, in whatever precision
MIN_ROWS = 20  # fewer say nothing
Drawn = dict[str, tuple[float, np.ndarray]]
SEEDS, ONE_SIDE, ROWS = "rows and seeds", "rows and one side's seeds", "rows"


@dataclass(frozen=True)
class Pair:
    """`first` against `second` (names of groups): difference of the metric, first less second, its 95 % interval, the
    verdict on first.
    `by`: rows, seeds, both; `rows` how many; `why` there is no verdict."""

    first: str
    second: str
    verdict: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    by: str = ""
    rows: int | None = None
    why: str = ""

    def turned(self) -> "Pair":
        """The same pair seen from `second`."""

        def minus(value: float | None) -> float | None:
            return None if value is None else -value + 0.0

        verdict = {BETTER: WORSE, WORSE: BETTER}.get(self.verdict, self.verdict)
        return replace(
            self,
            first=self.second,
            second=self.first,
            verdict=verdict,
            difference=minus(self.difference),
            low=minus(self.high),
            high=minus(self.low),
        )


@dataclass
class Matrix:
    """All pairs, by (first, second); `what` was compared, for people; notes on predictions that could not be used."""

    pairs: dict[tuple[str, str], Pair]
    what: str
    notes: list[str]


def matrix(found: Comparison) -> Matrix:
    """Every group that has a score against every other."""
    notes: list[str] = []
    groups, metric = [group for group in found.groups if group.runs], found.metric.split("/")[-1]
    tables = {run.name: _tables(run, metric, notes) for group in groups for run in group.runs}
    common = {(a.name, b.name): _common(a, b, tables) for a, b in combinations(groups, 2)}
    draws = _draws(common, tables, groups, metric, notes)
    pairs = {}
    for first, second in combinations(groups, 2):
        shared = common[first.name, second.name]
        pair = (
            _over_rows(first, second, shared, draws, found.smaller)
            if isinstance(shared, _Shared) and shared.key in draws
            else _over_seeds(
                first, second, found.smaller, shared if isinstance(shared, str) else f"{metric} does not come from rows"
            )
        )
        pairs[first.name, second.name], pairs[second.name, first.name] = pair, pair.turned()
    return Matrix(pairs, _what(found, common, pairs), notes)


@dataclass(frozen=True)
class _Shared:
    """The rows two groups have in common: in which file, their ids, and a key equal for equal rows."""

    file: str
    ids: np.ndarray
    key: tuple[str, str]


def _tables(run: Record, metric: str, notes: list[str]) -> dict[str, Rows]:
    """The run's predictions by file name; what cannot be used, or is not what its result says, is noted."""
    scores = [run.best, *(value for key, value in run.result.items() if key.endswith(f"/{metric}"))]
    scores = list(dict.fromkeys(value for value in scores if number(value)))
    found = {}
    for name in FILES:
        try:
            rows = read_rows(run.files(name), run.config.get("task"))
        except ValueError as error:
            notes.append(f"{run.name}: {error}; its rows are not compared.")
            continue
        if rows is None:
            continue
        found[name] = rows
        if (each := parts(rows, metric)) is not None:
            value = float(of_means(each.mean(0), metric))
            if min((abs(value - other) for other in scores), default=0) > SAME * max(1, abs(value)):
                notes.append(
                    f"{run.name}: {name} gives {metric} {value:.5g}, its result "
                    f"{' or '.join(f'{other:.5g}' for other in scores)}: is it "
                    "of the same run?"
                )
    return found


def _common(first: Group, second: Group, tables: dict[str, dict[str, Rows]]) -> _Shared | str:
    """What all runs of both groups predicted, or why there is nothing."""
    runs = [tables[run.name] for run in (*first.runs, *second.runs)]
    why = "no predictions with targets on both sides"
    for name in FILES:
        if not all(name in each for each in runs):
            continue
        rows = [each[name] for each in runs]
        ids = rows[0].ids
        for each in rows[1:]:
            if each.key != rows[0].key:
                ids = np.intersect1d(ids, each.ids)
        if len(ids) < MIN_ROWS:
            why = f"{len(ids)} rows in common are too few"
            continue
        if not all(each.at(ids).same_targets(rows[0].at(ids)) for each in rows[1:]):
            why = "the targets of the same rows differ"
            continue
        return _Shared(name, ids, (name, rows[0].at(ids).key))
    return why


def _draws(
    common: dict, tables: dict, groups: list[Group], metric: str, notes: list[str]
) -> dict[tuple[str, str], Drawn]:
    """By key of rows, by run: (score over these rows, (B,) scores of the draws). Runs on the same rows share the
    draws."""
    runs_of = {group.name: group.runs for group in groups}
    wanted: dict[tuple[str, str], tuple[_Shared, dict[str, None]]] = {}
    for pair, shared in common.items():
        if isinstance(shared, _Shared):
            wanted.setdefault(shared.key, (shared, {}))[1].update(
                {run.name: None for name in pair for run in runs_of[name]}
            )
    found = {}
    for key, (shared, names) in wanted.items():
        rows = [tables[name][shared.file].at(shared.ids) for name in names]
        try:
            drawn = bootstrap(rows, metric)
            found[key] = {
                name: (score(each, metric), drawn[:, place]) for place, (name, each) in enumerate(zip(names, rows))
            }
        except ValueError as error:
            notes.append(f"{shared.file} does not give {metric} ({error}).")
    return found


def _over_rows(first: Group, second: Group, shared: _Shared, draws: dict, smaller: bool) -> Pair:
    scores = [np.array([draws[shared.key][run.name][0] for run in group.runs]) for group in (first, second)]
    drawn = [np.mean([draws[shared.key][run.name][1] for run in group.runs], axis=0) for group in (first, second)]
    difference, apart, count = float(scores[0].mean() - scores[1].mean()), drawn[0] - drawn[1], len(shared.ids)
    if not np.isfinite(apart).all():
        return Pair(
            first.name,
            second.name,
            UNKNOWN,
            difference,
            rows=count,
            why="the metric is not defined on every draw of rows",
        )
    seeds, freedom = _seed_variance(scores)
    if seeds is None:
        low, high = np.quantile(apart, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return _judged(Pair(first.name, second.name, NOISE, difference, float(low), float(high), ROWS, count), smaller)
    reach = math.hypot(_reach(seeds, freedom), Z * float(apart.std()))
    by = SEEDS if min(map(len, scores)) > 1 else ONE_SIDE
    return _judged(
        Pair(first.name, second.name, NOISE, difference, difference - reach, difference + reach, by, count), smaller
    )


def _seed_variance(scores: list[np.ndarray]) -> tuple[list[float] | None, list[int]]:
    """Variance of each side's mean over seeds, and its degrees of freedom. A side of one run takes the other's spread;
    None for two of one."""
    several = [values for values in scores if len(values) > 1]
    if not several:
        return None, []
    used = [values if len(values) > 1 else several[0] for values in scores]
    return [float(own.var(ddof=1)) / len(values) for own, values in zip(used, scores)], [len(own) - 1 for own in used]


def _over_seeds(first: Group, second: Group, smaller: bool, why: str) -> Pair:
    """Welch's interval of the difference of the means."""
    scores = [np.array(group.scores) for group in (first, second)]
    difference = float(scores[0].mean() - scores[1].mean())
    if min(map(len, scores)) < 2:
        return Pair(
            first.name,
            second.name,
            UNKNOWN,
            difference,
            why=f"{why}, and n is too small ({len(scores[0])} and {len(scores[1])} runs)",
        )
    parts = [float(values.var(ddof=1)) / len(values) for values in scores]
    if not sum(parts):
        return Pair(first.name, second.name, UNKNOWN, difference, why=f"{why}, and the seeds do not differ")
    reach = _reach(parts, [len(values) - 1 for values in scores])
    return _judged(
        Pair(first.name, second.name, NOISE, difference, difference - reach, difference + reach, "seeds", why=why),
        smaller,
    )


def _reach(variances: list[float], freedom: list[int]) -> float:
    """Half of Welch's interval, from the variances of two means and their degrees of freedom."""
    from scipy.stats import t

    total = sum(variances)
    if not total:
        return 0.0
    joint = total**2 / sum(variance**2 / each for variance, each in zip(variances, freedom))
    return float(t.ppf((1 + LEVEL) / 2, joint)) * math.sqrt(total)


def _judged(pair: Pair, smaller: bool) -> Pair:
    """Better or worse only where the interval lies on one side of zero."""
    if pair.low is None or pair.high is None or pair.low <= 0 <= pair.high:
        return pair
    return replace(pair, verdict=BETTER if (pair.high < 0) == smaller else WORSE)


def _what(found: Comparison, common: dict, pairs: dict[tuple[str, str], Pair]) -> str:
    """One paragraph on what the verdicts rest on."""
    base, shared = found.metric.split("/")[-1], [each for each in common.values() if isinstance(each, _Shared)]
    counts, by = sorted({len(each.ids) for each in shared}), {pair.by for pair in pairs.values()}
    text = ["Differences in percentage points."] if in_percent(found.metric) else []
    if shared:
        files = " and ".join(sorted({each.file for each in shared}))
        text.append(
            f"{base} on the {' or '.join(f'{count:,}' for count in counts)} rows that both sides predicted ({files}): "
            f"bootstrap over the "
            f"rows, {DRAWS:,} draws, seed {SEED}, {LEVEL:.0%} intervals."
        )
    if by & {SEEDS, ONE_SIDE}:
        text.append(
            "Where a side has several seeds, Welch's interval over them is added, as squares"
            + ("; a side of one run is given the other's spread." if ONE_SIDE in by else ".")
        )
    if ROWS in by:
        text.append("One run against one run tells these two networks apart, not what another seed would give.")
    if "seeds" in by:
        text.append(f"Without rows in common: Welch's interval of {found.metric} over the seeds.")
    text.append("Each pair is judged by itself: of 100 pairs without any difference about 5 would be called one.")
    return " ".join(text)
