"""Settle class names: from the data, from a file, or ImageNet's for WordNet ids."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.data.prompts import read_list
from clipmerge.data.raw_split import RawSplit
from clipmerge.data.split import Split
from clipmerge.errors import DataError
from clipmerge.text import did_you_mean

__all__ = ["Names", "imagenet_names", "names_from", "plain_name", "settle_classes"]

Names = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A file, "imagenet", names in the order of labels, or the data's words (or numbers) → one name or several."""

_WORDNET = re.compile(r"n\d{8}")


def settle_classes(split: Split, raw: RawSplit, classnames: Names | None) -> tuple[Split, list[str]]:
    """Find the class names of a source, and turn the labels of the items in `split` into indices.

    Labels that are numbers are indices. Labels that are words are matched with the names given (blind to
    case, `_` and `-`), or stand for them in sorted order where none matches and there are as many of both.

    Returns:
        The split, with label -1 where an item cannot be used; and what cannot be used, "item: reason" each.
    """
    if raw.labels is None:
        return split, list(raw.unusable)
    user_names = None if classnames is None else names_from(classnames)
    labels, known = [str(raw.labels[i]) for i in split.index.tolist()], set(map(str, raw.labels))
    numbered = all(label.removeprefix("-").isdecimal() for label in known)
    words = () if numbered else raw.classes or tuple(sorted({*known, *raw.empty}))
    empty = list(raw.empty)
    problems, counts_as = list(raw.unusable), dict[int, int]()
    names: tuple[str, ...]
    if isinstance(user_names, Mapping):
        words = tuple(dict.fromkeys([*words, *sorted(set(labels))]))
        names, index, counts_as = _by_table(user_names, known)
    elif numbered:
        declared = raw.classes if user_names is None else None
        names = user_names or declared or tuple(map(str, range(max(map(int, labels), default=-1) + 1)))
        index = {label: int(label) for label in known if 0 <= int(label) < len(names)}
        problems += [
            f"{name}: label {label} is not in 0 … {len(names) - 1}"
            for name, label in zip(split.names, labels, strict=True)
            if label not in index
        ]
        if declared is not None:
            empty += [name for i, name in enumerate(names) if str(i) not in known]
    elif user_names is not None:
        names, index = user_names, _by_name(words, user_names)
    elif all(_WORDNET.fullmatch(word) for word in words):
        names, index = _by_wordnet(words)
    else:
        names, index = tuple(w.replace("_", " ") for w in words), {w: i for i, w in enumerate(words)}
    called = dict(enumerate(raw.classes or ())) if numbered else {i: word for word, i in index.items()}
    for word in words:
        if word not in index:
            guess = did_you_mean(word, names)
            problems.append(f"class {word!r}: not among the class names" + (f" ({guess})" if guess else ""))
    problems += [f"class {word!r}: no images" for word in empty]
    subset = np.array(sorted(counts_as or {index[word] for word in known if word in index}), np.int64)
    target = np.array([counts_as.get(i, i) for i in subset.tolist()], np.int64)
    merged = not np.array_equal(target, subset)
    return replace(
        split,
        classes=names,
        labels=np.array([index.get(label, -1) for label in labels], np.int64),
        class_subset=subset if merged or len(subset) < len(names) else None,
        counts_as=target if merged else None,
        words=tuple(called.get(i, "") for i in range(len(names))) if called else (),
        given=split.given | ({"classes"} if user_names is not None else frozenset()),
    ), problems


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
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or twice:
        problem = f"names {twice[0]!r} twice" if twice else "holds no names"
        hint = "one class name a line, each once, in the order of the labels"
        raise DataError(f"{source} {problem}", hint=hint)
    return names


def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 names that CLIP is prompted with."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def _by_wordnet(ids: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
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


def _by_table(
    table: Mapping[str, tuple[str, ...]], known: set[str]
) -> tuple[tuple[str, ...], dict[str, int], dict[int, int]]:
    """Return a table's names, or ImageNet's full head where all of them are ImageNet's; and words' places.

    Also for each class that a word of the data names the class that it counts as: the word's first name.
    """
    listed = tuple(dict.fromkeys(name for names in table.values() for name in names))
    imagenet = imagenet_names()
    names = imagenet if set(listed) <= set(imagenet) else listed
    place = {name: i for i, name in enumerate(names)}
    index = {word: place[meant[0]] for word, meant in table.items() if meant}
    word_of: dict[str, str] = {}
    for word in sorted(known & index.keys()):
        for name in table[word]:
            other = word_of.setdefault(name, word)
            if index[other] != index[word]:
                raise DataError(
                    f"class name {name!r} is listed for both {other!r} and {word!r}, which count as different classes",
                    hint="words that share a name must share the first of their names",
                )
    return names, index, {place[name]: index[word] for name, word in word_of.items()}


def plain_name(name: str) -> str:
    """Return a class name as it is compared: blind to case, and to `_` and `-` for spaces."""
    return " ".join(re.split(r"[\s_-]+", name.lower().strip(" _-")))


def _by_name(words: Sequence[str], names: tuple[str, ...]) -> dict[str, int]:
    """Return word → index of the name that it means."""
    places = {plain_name(name): i for i, name in enumerate(names)}
    index = {w: places[plain_name(w)] for w in words if plain_name(w) in places}
    if not index and len(words) == len(names):
        return {w: i for i, w in enumerate(sorted(words))}
    return index
