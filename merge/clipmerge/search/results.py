"""What a search hands back: checkpoints chosen (soups, ensembles) or coefficients chosen, as tables and JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipmerge.errors import SelectionError
from clipmerge.evaluate.metrics import METRICS
from clipmerge.evaluate.score import Score, Stopped
from clipmerge.figures.draw import draw
from clipmerge.search.rules import Rule
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clipmerge.evaluate.evaluator import Evaluator

Cell = str

_MOST_COLUMNS = 6
_MOST_ROWS = 40


@dataclass(frozen=True)
class Table:
    """Text cells under headers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.headers, *self.rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in (self.headers, *self.rows)
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)]).lstrip("\n")

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        caption = f"<caption>{escape(self.title)}</caption>" * bool(self.title)
        return f"<table>{caption}<thead>{row(self.headers, 'th')}</thead><tbody>{body}</tbody></table>"


class _Shown:
    """How a result looks at a prompt (a table) and in a notebook (the same, as HTML), and its figure."""

    def table(self) -> Table:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw it; with a path, write it as PNG, and as SVG beside it.

        Raises:
            SelectionError: there is no figure of this kind of result.
        """
        return draw(self.to_json(), path)


# -- checkpoints chosen ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One candidate's turn in a greedy search.

    Attributes:
        number: 1 for the first.
        alone: the candidate's own score, None where the order did not ask for it.
        outcome: the score with the candidate, or how it was stopped because it could not win.
        images_scored: images that were looked at for it (0: the score was known).
        size, best: members, and their score, after this turn.
        p: McNemar's p of the outcome against the score before it.
    """

    number: int
    name: str
    alone: float | None
    outcome: Score | Stopped
    accepted: bool
    images_scored: int
    size: int
    best: float
    p: float | None

    @property
    def value(self) -> float | None:
        """The score with the candidate, None where it was stopped."""
        return self.outcome.value if isinstance(self.outcome, Score) else None

    @property
    def at_most(self) -> float | None:
        """The best that a stopped candidate could still have reached."""
        return self.outcome.at_most if isinstance(self.outcome, Stopped) else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % for `value`."""
        return self.outcome.interval if isinstance(self.outcome, Score) else None

    def to_json(self) -> dict[str, Any]:
        """Return numbers and words, ready for `json.dumps`."""
        names = ("number", "name", "alone", "value", "at_most", "interval", "accepted", "size", "best", "p")
        document = {name: getattr(self, name) for name in names}
        return document | {"images_scored": self.images_scored, "stopped": self.value is None}

    def row(self) -> tuple[Cell, ...]:
        """Return the cells of a table's row."""
        shown = _percent(self.value) if self.at_most is None else f"≤ {_percent(self.at_most)}"
        verdict = "accepted" if self.accepted else "refused"
        alone, best = _percent(self.alone), _percent(self.best)
        p = p_text(self.p)
        return (str(self.number), self.name, alone, shown, _interval_text(self.interval), p, verdict, best)


@dataclass(frozen=True, repr=False)
class SoupResult(_Shown):
    """A soup or an ensemble, and how it came about.

    Attributes:
        soup: the soup, unread until it is saved or loaded; None for an ensemble.
        members: an ensemble's weights, each of which must run for every image.
        ingredients: names, in the order in which they were accepted. names: all candidates, in the order given.
        score: the held-out score, None for a uniform soup that nobody scored.
        coefficients: of a learned soup, name (or group, then name) → share.
        temperature: the factor on a learned soup's logits that was learned beside its shares.
        images: {"scored", "saved"}: images through a model, and spared by early stopping and the journal.
        transductive: whether test images, without their labels, were learned on.
    """

    kind: Literal["uniform_soup", "greedy_soup", "learned_soup", "greedy_ensemble", "adamerging"]
    soup: Weights | None
    ingredients: tuple[str, ...]
    names: tuple[str, ...]
    members: tuple[Weights, ...] = ()
    history: tuple[Step, ...] = ()
    score: Score | None = None
    split: str | None = None
    strict: bool = False
    coefficients: Mapping[str, Any] | None = None
    temperature: float | None = None
    images: Mapping[str, int] | None = None
    transductive: bool = False

    @property
    def weights(self) -> Weights:
        """The soup.

        Raises:
            SelectionError: it is an ensemble, which is several models.
        """
        if self.soup is None:
            raise SelectionError("an ensemble is several models, not one", hint="see its members")
        return self.soup

    def table(self) -> Table:
        """Return one row per candidate, in the order of their turns; or a learned soup's shares."""
        title = self.kind.replace("_", " ")
        if self.coefficients is not None:
            title += " on test images (transductive)" * self.transductive
            word = "scale" if self.kind == "adamerging" else "share"
            return shares_table(self.coefficients, self.temperature, title, word)
        if not self.history or self.score is None:
            return Table(("checkpoint",), tuple((name,) for name in self.names), title)
        # McNemar's test compares first answers, whatever the metric.
        first = "recall@1" if METRICS[self.score.metric].retrieval else "top1"
        p = "p" if self.score.metric == first else f"p ({METRICS[first].title})"
        headers = ("", "checkpoint", "alone", "with it", "95 %", p, "", "best")
        title += f": {len(self.ingredients)} of {len(self.names)}"
        return Table(headers, tuple(step.row() for step in self.history), title)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights, ready for `json.dumps`."""
        document: dict[str, Any] = {
            "kind": self.kind,
            "split": self.split,
            "metric": None if self.score is None else self.score.metric,
            "strict": self.strict,
            "candidates": list(self.names),
            "order": [step.name for step in self.history] or list(self.names),
            "ingredients": list(self.ingredients),
            "score": None if self.score is None else self.score.to_json(),
            "history": [step.to_json() for step in self.history],
        }
        extras = {"coefficients": self.coefficients, "temperature": self.temperature, "images": self.images}
        extras |= {"transductive": True} if self.transductive else {}
        return document | {key: value for key, value in extras.items() if value is not None}


def shares_table(
    coefficients: Mapping[str, Any],
    temperature: float | None,
    title: str = "learned soup",
    word: str = "share",
) -> Table:
    """Show learned shares: all of them where they fit on a screen, else their range over the groups."""
    title += "" if temperature is None else f"; logits times {temperature:.4g}"
    rows = list(coefficients.values())
    if not isinstance(rows[0], Mapping):
        pairs = tuple((name, f"{share:.4f}") for name, share in coefficients.items())
        return Table(("checkpoint", word), pairs, title)
    names = tuple(rows[0])
    if len(names) <= _MOST_COLUMNS and len(rows) <= _MOST_ROWS:
        cells = tuple((group, *(f"{row[n]:.4f}" for n in names)) for group, row in coefficients.items())
        return Table(("group", *names), cells, title)
    shares = {name: [row[name] for row in rows] for name in names}
    ranges = tuple(
        (name, *(f"{x:.4f}" for x in (sum(s) / len(s), min(s), max(s)))) for name, s in shares.items()
    )
    return Table(("checkpoint", f"mean {word}", "lowest", "highest"), ranges, f"{title}; {len(rows)} groups")


# -- coefficients chosen -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Coefficients that were tried, exactly.

    Attributes:
        scores: split → score. value: the rule's figure. allowed: whether the rule may choose it.
        refined: found between grid points.
    """

    coefficients: Mapping[str, Fraction]
    scores: Mapping[str, Score]
    value: Fraction
    allowed: bool = True
    refined: bool = False

    @property
    def coefficient(self) -> float:
        """The only coefficient."""
        (only,) = self.coefficients.values()
        return float(only)


@dataclass(frozen=True, kw_only=True, repr=False)
class SweepResult(_Shown):
    """Coefficients tried, and the choice: a sweep of one, a search over several, or patching made of either.

    Attributes:
        name: the family of a sweep ("interpolate", "add" …), the method of a search, the mode of patching.
        weights: the model chosen. coefficients: its numbers by name; one for each task of sequential patching.
        chosen: its point. history: every point, by coefficient for a sweep and else in order.
        steps: the sweeps (or the one search) that patching is made of.
    """

    kind: Literal["sweep", "coefficients", "patch"]
    name: str
    rule: Rule
    weights: Weights
    coefficients: Mapping[str, float]
    chosen: Point
    history: tuple[Point, ...]
    images: Mapping[str, int]
    steps: "tuple[SweepResult, ...]" = ()

    @property
    def coefficient(self) -> float:
        """The only coefficient that was chosen."""
        (only,) = self.coefficients.values()
        return only

    @property
    def base(self) -> Point | None:
        """The point where every coefficient is 0, where it was tried."""
        return next((point for point in self.history if not any(point.coefficients.values())), None)

    def table(self) -> Table:
        """Return a sweep's points, or those at which a search rose; the chosen one is marked in words."""
        if self.kind == "patch":
            tables = [step.table() for step in self.steps]
            rows = [
                (str(n), t.rows[i][0], *t.rows[i][-2:])
                for n, t in enumerate(tables, 1)
                for i in range(len(t.rows))
            ]
            several = Table(("step", "alpha", "paint", ""), tuple(rows), f"{self.name} patching")
            return tables[0] if len(tables) == 1 else several
        searched, splits = self.kind == "coefficients", list(self.chosen.scores)
        names = tuple(self.coefficients) if len(self.coefficients) <= _MOST_COLUMNS else ()
        figure = () if self.rule.largest_allowed else (self.rule.name,)
        headers = ("evaluation",) * searched + names
        headers += tuple(cell for split in splits for cell in (split, "95 %", "p"))
        table, best = list[tuple[Cell, ...]](), None
        for number, point in enumerate(self.history, 1):
            if searched and not (
                point.allowed and (best is None or point.value > best or point is self.chosen)
            ):
                continue
            best = point.value
            cells = [str(number)] * searched + [f"{float(point.coefficients[name]):g}" for name in names]
            for split, score in point.scores.items():
                p = p_text(self._p(point, split))
                cells += [_percent(score.value), _interval_text(score.interval), p]
            cells += [_percent(float(point.value))] * len(figure)
            notes = {
                "chosen": point is self.chosen,
                "not allowed": not point.allowed,
                "refined": point.refined,
            }
            table.append((*cells, ", ".join(note for note, holds in notes.items() if holds)))
        title = f"{self.name}{' search' * searched}: {self.rule.says}"
        return Table((*headers, *figure, ""), tuple(table), title)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights, ready for `json.dumps`."""
        kinds = {"sweep": "family", "coefficients": "method", "patch": "mode"}
        document = {
            "kind": self.kind,
            kinds[self.kind]: self.name,
            "rule": self.rule.to_json(),
            **_numbers(self.coefficients),
            "metric": next(iter(self.chosen.scores.values())).metric,
            "splits": list(self.chosen.scores),
            "images": dict(self.images),
        }
        if self.kind == "patch":
            return document | {"steps": [step.to_json() for step in self.steps]}
        return document | {"history": [self._point_json(point) for point in self.history]}

    def _p(self, point: Point, split: str) -> float | None:
        """Compute McNemar's p of a point against the base."""
        base = self.base
        return None if base is None or base is point else base.scores[split].p_value(point.scores[split])

    def _point_json(self, point: Point) -> dict[str, Any]:
        return {
            **_numbers(point.coefficients),
            "value": float(point.value),
            "allowed": point.allowed,
            "refined": point.refined,
            "chosen": point is self.chosen,
            "scores": {
                split: s.to_json() | {"p": self._p(point, split)} for split, s in point.scores.items()
            },
        }


def _numbers(coefficients: Mapping[str, float | Fraction]) -> dict[str, Any]:
    """Return coefficients by name, and the only one by itself, for JSON."""
    numbers = {name: float(number) for name, number in coefficients.items()}
    return {"coefficients": numbers} | (
        {"coefficient": next(iter(numbers.values()))} if len(numbers) == 1 else {}
    )


def count_images(evaluator: "Evaluator") -> Callable[[], dict[str, int]]:
    """Return what tells how many images were scored and saved since this call."""
    scored, saved = evaluator.images_scored, evaluator.images_saved
    return lambda: {"scored": evaluator.images_scored - scored, "saved": evaluator.images_saved - saved}


def _percent(value: float | None) -> Cell:
    """Write 0.8125 as 81.25; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def _interval_text(interval: Sequence[float] | None) -> Cell:
    """Write a 95 % interval as 78.1–84.0."""
    return "–" if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


def p_text(p: float | None) -> Cell:
    """Write a p value, a small one as a bound."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
