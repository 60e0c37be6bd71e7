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
    names = None if classnames is None else names_from(classnames)
    labels = raw.labels
    if labels is None:
        return Resolved((), np.full(len(raw.names), -1, np.int64), None, list(raw.unusable))
    if isinstance(names, Mapping):
        return _by_table(raw, [str(label) for label in labels], names)
    if isinstance(labels, np.ndarray):
        return _by_number(raw, labels.astype(np.int64), names, raw.classes)
    words = raw.classes or tuple(sorted(set(labels)))
    if names is None and all(_WORDNET.fullmatch(w) for w in words):
        return _by_word(raw, labels, words, *_wordnet_names(words))
    if all(w.isdecimal() for w in words):
        return _by_number(raw, np.array([int(w) for w in labels], np.int64), names, None)
    if names is None:
        names = tuple(w.replace("_", " ") for w in words)
        return _by_word(raw, labels, words, names, {w: i for i, w in enumerate(words)})
    return _by_word(raw, labels, words, names, _matches(words, names))


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


def _by_number(
    raw: RawSplit, labels: Ints, given: tuple[str, ...] | None, declared: Sequence[str] | None
) -> Resolved:
    """Take labels as indices. Without any names the numbers are the names."""
    names = tuple(given or declared or map(str, range(int(labels.max(initial=-1)) + 1)))
    outside = (labels < 0) | (labels >= len(names))
    unusable = [
        *raw.unusable,
        *(Unusable(raw.names[i], f"label {labels[i]} is not in 0 … {len(names) - 1}")
          for i in np.flatnonzero(outside).tolist()),
    ]  # fmt: skip
    unusable += [Unusable(f"class {word!r}", "no images") for word in raw.empty]
    present = {int(label) for label in [*labels, *raw.all_labels] if 0 <= int(label) < len(names)}
    if given is None and declared is not None:
        absent = (name for i, name in enumerate(names) if i not in present)
        unusable += [Unusable(f"class {name!r}", "no images") for name in absent]
    return Resolved(names, np.where(outside, -1, labels), _subset(present, len(names)), unusable)


def _by_word(
    raw: RawSplit, labels: Sequence[str], words: Sequence[str], names: tuple[str, ...], index: dict[str, int]
) -> Resolved:
    """Take labels as words, through `index` from word to place in `names`."""
    unusable = list(raw.unusable)
    for word in words:
        if word not in index:
            guess = did_you_mean(word, names)
            reason = "not among the class names" + (f" ({guess})" if guess else "")
            unusable.append(Unusable(f"class {word!r}", reason))
    unusable += [Unusable(f"class {word!r}", "no images") for word in raw.empty]
    numbers = np.array([index.get(label, -1) for label in labels], np.int64)
    present = {index[str(word)] for word in [*labels, *raw.all_labels] if str(word) in index}
    return Resolved(names, numbers, _subset(present, len(names)), unusable)


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


def _by_table(raw: RawSplit, labels: list[str], table: Mapping[str, tuple[str, ...]]) -> Resolved:
    """Translate words by a table of names; into ImageNet's full head where all of the names are ImageNet's."""
    listed = tuple(dict.fromkeys(name for names in table.values() for name in names))
    imagenet = imagenet_names()
    classes = imagenet if set(listed) <= set(imagenet) else listed
    place = {name: i for i, name in enumerate(classes)}
    index = {word: place[names[0]] for word, names in table.items() if names}
    declared = () if isinstance(raw.labels, np.ndarray) else raw.classes or ()
    words = tuple(dict.fromkeys([*declared, *(labels if declared else sorted(set(labels)))]))
    resolved = _by_word(raw, labels, words, classes, index)
    counts_as: dict[int, int] = {}
    for word in sorted({*labels, *map(str, raw.all_labels)} & index.keys()):
        for name in table[word]:
            if counts_as.setdefault(place[name], index[word]) != index[word]:
                other = next(
                    w for w in sorted(index) if index[w] == counts_as[place[name]] and name in table[w]
                )
                raise DataError(
                    f"class name {name!r} is listed for both {other!r} and {word!r}, which count as different classes",
                    hint="words that share a name must share the first of their names",
                )
    subset = np.array(sorted(counts_as), np.int64)
    target = np.array([counts_as[int(c)] for c in subset], np.int64)
    if (target == subset).all():
        return Resolved(classes, resolved.labels, _subset(set(counts_as), len(classes)), resolved.unusable)
    return Resolved(classes, resolved.labels, subset, resolved.unusable, target)


def _matches(words: Sequence[str], names: tuple[str, ...]) -> dict[str, int]:
    """Return word → index of the name that it means."""

    def plain(name: str) -> str:
        return " ".join(re.split(r"[\s_-]+", name.lower().strip(" _-")))

    places = {plain(name): i for i, name in enumerate(names)}
    index = {w: places[plain(w)] for w in words if plain(w) in places}
    if not index and len(words) == len(names):
        return {w: i for i, w in enumerate(sorted(words))}
    return index


def _subset(present: set[int], total: int) -> Ints | None:
    return None if len(present) == total else np.array(sorted(present), np.int64)
