"""Settle class names: from the data, from a file, or ImageNet's for WordNet ids."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.data.raw_split import RawSplit
from clipmerge.data.survey import Unusable
from clipmerge.data.text_lists import read_list
from clipmerge.errors import DataError
from clipmerge.text import did_you_mean
from clipmerge.types import Ints

__all__ = ["Names", "Resolved", "imagenet_names", "names_from", "resolve"]

Names = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A file, "imagenet", names in the order of labels, or the data's words (or numbers) → one name or several."""

_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Labels as indices into `classes`, -1 where an item cannot be used; the rest as in Split."""

    classes: tuple[str, ...]
    labels: Ints
    subset: Ints | None
    unusable: list[Unusable]
    counts_as: Ints | None = None


def resolve(raw: RawSplit, classnames: Names | None = None) -> Resolved:
    """Find the class names of a source and turn its labels into indices.

    Labels that are numbers are indices. Labels that are words are matched with the names given (blind to
    case, `_` and `-`), or stand for them in sorted order where none matches and there are as many of both.
    """
    if raw.labels is None:
        return Resolved((), np.full(len(raw.names), -1, np.int64), None, list(raw.unusable))
    user_names = None if classnames is None else names_from(classnames)
    are_numbers = isinstance(raw.labels, np.ndarray)
    labels = list(map(str, raw.labels.tolist() if isinstance(raw.labels, np.ndarray) else raw.labels))
    known = {*labels, *map(str, raw.all_labels)}
    words = () if are_numbers else raw.classes or tuple(sorted(set(labels)))
    problems: list[Unusable] = []
    counts_as: dict[int, int] = {}
    if isinstance(user_names, Mapping):
        words = tuple(dict.fromkeys([*words, *sorted(set(labels))]))
        names, index = _table_names(user_names)
        counts_as = _counts_as(user_names, names, index, known)
    elif are_numbers or all(word.isdecimal() for word in words):
        declared = raw.classes if are_numbers and user_names is None else None
        names = user_names or declared or tuple(map(str, range(max(map(int, labels), default=-1) + 1)))
        index = {label: int(label) for label in known if 0 <= int(label) < len(names)}
        outside = f"is not in 0 … {len(names) - 1}"
        problems = [
            Unusable(name, f"label {label} {outside}")
            for name, label in zip(raw.names, labels, strict=True)
            if label not in index
        ]
        absent = [] if declared is None else sorted(set(range(len(names))) - set(index.values()))
        problems += [Unusable(f"class {names[i]!r}", "no images") for i in absent]
        words = ()
    elif user_names is not None:
        names, index = user_names, _matches(words, user_names)
    elif all(_WORDNET.fullmatch(word) for word in words):
        names, index = _wordnet_names(words)
    else:
        names, index = tuple(w.replace("_", " ") for w in words), {w: i for i, w in enumerate(words)}
    for word in words:
        if word not in index:
            guess = did_you_mean(word, names)
            reason = "not among the class names" + (f" ({guess})" if guess else "")
            problems.append(Unusable(f"class {word!r}", reason))
    problems += [Unusable(f"class {word!r}", "no images") for word in raw.empty]
    numbers = np.array([index.get(label, -1) for label in labels], np.int64)
    subset = np.array(sorted(counts_as or {index[word] for word in known if word in index}), np.int64)
    target = np.array([counts_as.get(i, i) for i in subset.tolist()], np.int64)
    merged = None if (target == subset).all() else target
    whole = merged is None and len(subset) == len(names)
    return Resolved(names, numbers, None if whole else subset, [*raw.unusable, *problems], merged)


def names_from(classnames: Names) -> tuple[str, ...] | Mapping[str, tuple[str, ...]]:
    """Return the names in a file (one a line, or JSON), ImageNet's for "imagenet", or those given.

    Raises:
        DataError: no such file, or no names in it, or a name twice.
    """
    if isinstance(classnames, str) and classnames == "imagenet":
        return imagenet_names()
    source, listed = "class names", classnames
    if isinstance(classnames, str | Path):
        hint = "give a text file with one name a line, a JSON list or object, or the word imagenet"
        source, listed = str(classnames), read_list(Path(classnames), "class names", hint)
    if isinstance(listed, Mapping):
        return {word: (name,) if isinstance(name, str) else tuple(name) for word, name in listed.items()}
    names = tuple(map(str, listed))  # type: ignore[arg-type]
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if not names or twice:
        problem = f"names {twice[0]!r} twice" if twice else "holds no names"
        hint = "one class name a line, each once, in the order of the labels"
        raise DataError(f"{source} {problem}", hint=hint)
    return names


def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 names that CLIP is prompted with."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def _wordnet_names(ids: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return ImageNet-1k's full list of names where the ids touch it, else names from WordNet; and ids' places."""
    from timm.data.imagenet_info import ImageNetInfo

    imagenet: Any = ImageNetInfo("imagenet-1k")
    order = {w: i for i, w in enumerate(imagenet.label_names())}
    if any(w in order for w in ids):
        return imagenet_names(), {w: order[w] for w in ids if w in order}
    lemmas: Any = ImageNetInfo("imagenet-22k")
    described = set(lemmas.label_names()).issuperset(ids)
    names = tuple(lemmas.label_name_to_description(w).split(",")[0] if described else w for w in ids)
    return names, {w: i for i, w in enumerate(ids)}


def _table_names(table: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names in a table of words, or ImageNet's full head where all of them are ImageNet's; words' places."""
    listed = tuple(dict.fromkeys(name for names in table.values() for name in names))
    imagenet = imagenet_names()
    names = imagenet if set(listed) <= set(imagenet) else listed
    place = {name: i for i, name in enumerate(names)}
    return names, {word: place[meant[0]] for word, meant in table.items() if meant}


def _counts_as(
    table: Mapping[str, tuple[str, ...]], names: Sequence[str], index: Mapping[str, int], known: set[str]
) -> dict[int, int]:
    """Return for each class that a word of the data names the class that it counts as: the word's first name."""
    place = {name: i for i, name in enumerate(names)}
    counts_as: dict[int, int] = {}
    namer: dict[int, str] = {}
    for word in sorted(known & index.keys()):
        for name in table[word]:
            other = namer.setdefault(place[name], word)
            if counts_as.setdefault(place[name], index[word]) != index[word]:
                raise DataError(
                    f"class name {name!r} is listed for both {other!r} and {word!r}, which count as different classes",
                    hint="words that share a name must share the first of their names",
                )
    return counts_as


def _matches(words: Sequence[str], names: tuple[str, ...]) -> dict[str, int]:
    """Return word → index of the name that it means."""

    def plain(name: str) -> str:
        return " ".join(re.split(r"[\s_-]+", name.lower().strip(" _-")))

    places = {plain(name): i for i, name in enumerate(names)}
    index = {w: places[plain(w)] for w in words if plain(w) in places}
    if not index and len(words) == len(names):
        return {w: i for i, w in enumerate(sorted(words))}
    return index
