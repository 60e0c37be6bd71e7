"""Settle class names: from the data, from a file, or ImageNet's for WordNet ids."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.data.prompts import read_list
from clipmerge.data.raw_split import RawSplit
from clipmerge.data.split import Split
from clipmerge.errors import DataError
from clipmerge.text import and_more, did_you_mean, natural
from clipmerge.types import Ints

__all__ = ["Names", "class_words", "imagenet_names", "names_from", "plain_name", "settle_classes"]

Names = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A file, "imagenet", names in the order of labels, or the data's words (or numbers) → one name or several."""

_WORDNET = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"(-?[0-9]+)(\.0*)?")
"""A label that is a number: pandas writes 3.0 where a column has gaps."""

_ORDINAL = re.compile(r"[0-9]+[\s._-]+(?=[^\W\d_])")
_CAMEL = re.compile(r"[A-Z]?[a-z]{2,}(?:[A-Z][a-z]+)+")
_WORDS_NEEDED = "prompts need words: give --classnames"
_DIGITS = tuple(map(str, range(1000)))
_MOST_CLASSES = 1_000_000
_TABLE = 'say which is which in a JSON object: --classnames with {"%s": "a name", …}'


def _spaced(name: str) -> str:
    """Put one space for underscores and runs of spaces."""
    return " ".join(name.replace("_", " ").split())


def class_words(names: Sequence[str]) -> tuple[str, ...]:
    """Turn the class names of a data set into words for prompts, by one rule for every source.

    Underscores are spaces. Where every class has one, a number in front is left out ("001.Laysan_Albatross",
    "3 - three"), and where no name has a space, AnnualCrop is "Annual Crop". Nothing else changes, and nothing at all
    where two classes would get the same name. Names that the user gives are taken as they are.
    """
    words = [_spaced(name) for name in names]
    if len(words) > 1 and all(_ORDINAL.match(word) for word in words):
        words = [_ORDINAL.sub("", word, count=1) for word in words]
    if not any(" " in word for word in words):
        words = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", w) if _CAMEL.fullmatch(w) else w for w in words]
    return tuple(words) if len(set(words)) == len(set(names)) else tuple(names)


@dataclass
class _Classes:
    """The classes of a source.

    Attributes:
        index: label as the source writes it → index into `names`.
        counts_as: index → index that it counts as, where the two may differ.
        empty: classes that should have images and have none.
    """

    names: tuple[str, ...]
    index: Mapping[str, int]
    counts_as: Mapping[int, int] = field(default_factory=dict)
    empty: Sequence[str] = ()
    remarks: Sequence[str] = ()


def settle_classes(
    split: Split, raw: RawSplit, classnames: Names | None, items: Ints
) -> tuple[Split, list[str]]:
    """Find the class names of a source, and turn the labels of `items`, those in `split`, into indices.

    Labels that are numbers are indices, from 0. Labels that are words are matched with the names given (blind to case
    and to what `class_words` changes); where none matches and there are as many of both, they are taken in order, if
    there is one order only.

    Returns:
        The split, with label -1 where an item cannot be used; and what cannot be used, "item: reason" each.

    Raises:
        DataError: labels start at 1, or names and words could be paired in two ways.
    """
    if raw.labels is None:
        return split, list(raw.unusable)
    every = [str(label) for label in raw.labels]
    known, given = set(every), None if classnames is None else names_from(classnames)
    numbers = {label: int(match[1]) for label in known if (match := _NUMBER.fullmatch(label))}
    numbered = 2 * sum(label in numbers for label in every) > len(every)
    if isinstance(given, Mapping):
        classes = _by_table(given, numbers if numbered else {}, known, raw.classes or ())
    elif numbered:
        classes = _by_number(split.source, numbers, given, raw.classes)
    else:
        classes = _by_word(split.source, {*known, *raw.empty}, known, given, raw.classes)
    index, names = classes.index, classes.names
    labels, problems = [every[i] for i in items.tolist()], list(raw.unusable)
    if numbered and not isinstance(given, Mapping):
        problems += [
            f"{name}: {_why(label, numbers, raw.classes, len(names))}"
            for name, label in zip(split.names, labels, strict=True)
            if label not in index
        ]
    else:
        for word in sorted(known - index.keys(), key=natural):
            guess = did_you_mean(word, names)
            problems.append(f"class {word!r}: not among the class names" + (f" ({guess})" if guess else ""))
    problems += [f"class {word!r}: no images" for word in dict.fromkeys([*raw.empty, *classes.empty])]
    subset = np.array(sorted(classes.counts_as or {index[label] for label in known & index.keys()}), np.int64)
    called = {i: word for word, i in index.items()}
    if numbered and not isinstance(given, Mapping):
        declared = raw.classes or ()
        called = dict(enumerate(declared)) if len(declared) == len(names) else {}
        called |= {
            i: declared[numbers[label]] for label, i in index.items() if numbers[label] < len(declared)
        }
    target = np.array([classes.counts_as.get(i, i) for i in subset.tolist()], np.int64)
    merged = not np.array_equal(target, subset)
    remarks = [*split.remarks, *classes.remarks]
    chosen = Counter(names[i] for i in np.unique(target).tolist())
    twice = sorted(name for name, count in chosen.items() if count > 1 and names != imagenet_names())
    if twice:
        remarks.append(f"several classes have one name: {and_more(twice)}")
    alike = Counter(_spaced(name).casefold() for name in chosen)
    if close := sorted(name for name in chosen if alike[_spaced(name).casefold()] > 1):
        listed = and_more([repr(name) for name in close])
        remarks.append(
            f"classes that differ in case or spaces only, which prompts hardly tell apart: {listed}"
        )
    if len(np.unique(target)) == 1:
        remarks.append(
            f"its only class is {names[int(target[0])]!r}, so no score can follow: any model is right"
        )
    return replace(
        split,
        classes=names,
        labels=np.array([index.get(label, -1) for label in labels], np.int64),
        class_subset=subset if merged or len(subset) < len(names) else None,
        counts_as=target if merged else None,
        words=tuple(called.get(i, "") for i in range(len(names))) if called else (),
        given=split.given | ({"classes"} if given is not None else frozenset()),
        remarks=tuple(remarks),
    ), problems


def names_from(classnames: Names) -> tuple[str, ...] | Mapping[str, tuple[str, ...]]:
    """Return the names in a file (one per line, or JSON), ImageNet's for "imagenet", or those given.

    Raises:
        DataError: no such file, or no names in it, or a name twice.
    """
    if isinstance(classnames, str) and classnames == "imagenet":
        return imagenet_names()
    source, listed = "class names", classnames
    if isinstance(classnames, str | Path):
        hint = "give a text file with one name per line, a JSON list or object, or the word imagenet"
        source, listed = str(classnames), read_list(Path(classnames), "class names", hint, by_line=True)
    if isinstance(listed, Mapping):
        return {word: (name,) if isinstance(name, str) else tuple(name) for word, name in listed.items()}
    names = tuple(map(str, listed))  # type: ignore[arg-type]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or twice:
        problem = f"names {twice[0]!r} twice" if twice else "holds no names"
        hint = "one class name per line, each once, in the order of the labels"
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
    table: Mapping[str, tuple[str, ...]], numbers: Mapping[str, int], known: set[str], declared: Sequence[str]
) -> _Classes:
    """Return a table's names, or ImageNet's full head where all of them are ImageNet's.

    Each class that a word of the data names counts as the word's first name.
    """
    keys = {int(match[1]): word for word in table if (match := _NUMBER.fullmatch(word))}
    for label, number in numbers.items():  # "3.0" and "03" are the table's "3"; so is what the data calls it
        called = declared[number] if 0 <= number < len(declared) else ""
        key = next((key for key in (label, keys.get(number), called) if key in table), None)
        if key is not None:
            table = {**table, label: table[key]}
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
    return _Classes(names, index, {place[name]: index[word] for name, word in word_of.items()})


def _by_number(
    source: str,
    numbers: Mapping[str, int],
    given: tuple[str, ...] | None,
    declared: tuple[str, ...] | None,
) -> _Classes:
    """Take labels as indices into the names that are given or that the source declares, else as names themselves."""
    values = {value for value in numbers.values() if value >= 0}
    highest, names = max(values, default=-1), given or declared
    if values and min(values) == 1 and (names is None or highest == len(names)):
        raise DataError(
            f"{source}: its labels start at 1 (1 … {highest}), and labels are indices that start at 0",
            hint="subtract 1 from each label, or " + _TABLE % "1",
        )
    remarks = list[str]()
    if names is not None and values and min(values) == 1:
        remarks.append(f"no image has label 0 ({names[0]}): do its labels start at 1?")
    if names is None and highest >= _MOST_CLASSES:
        raise DataError(
            f"{source}: label {highest} cannot be an index: no data has so many classes",
            hint="number the classes from 0, or " + _TABLE % highest,
        )
    if names is None:
        names = tuple(map(str, range(highest + 1)))
        remarks.append(f"its classes have no names but numbers, 0 … {highest}; {_WORDS_NEEDED}")
    index = {label: value for label, value in numbers.items() if 0 <= value < len(declared or names)}
    if given is not None and declared is not None and len({*declared} - {*_DIGITS}) == len(declared):
        place = _matches(declared, given) or _in_order(source, declared, given, remarks)
        index = {label: place[declared[i]] for label, i in index.items() if declared[i] in place}
        return _Classes(given, index, remarks=remarks)
    if given is not None or declared is None:
        index = {label: i for label, i in index.items() if i < len(names)}
        return _Classes(names, index, remarks=remarks)
    empty = [name for i, name in enumerate(declared) if i not in values]
    if all(map(_WORDNET.fullmatch, declared)):
        names, place = _by_wordnet(declared)
        index = {label: place[declared[i]] for label, i in index.items() if declared[i] in place}
    else:
        names = class_words(declared)
    return _Classes(names, index, empty=empty, remarks=remarks)


def _by_word(
    source: str,
    words: Collection[str],
    known: Collection[str],
    given: tuple[str, ...] | None,
    declared: tuple[str, ...] | None,
) -> _Classes:
    """Match labels that are words with the names that are given or declared, else make names of them."""
    ordered = tuple(sorted(words, key=natural))
    if given is not None and not (given == imagenet_names() and any(map(_WORDNET.fullmatch, words))):
        index, remarks = _by_name(source, ordered, given)
        return _Classes(given, index, remarks=remarks)
    if all(map(_WORDNET.fullmatch, words)):
        return _Classes(*_by_wordnet(ordered))
    if given is None and declared is not None:
        index, remarks = _by_name(source, ordered, declared)
        used = {index[word] for word in known if word in index}
        empty = [name for i, name in enumerate(declared) if i not in used]
        return _Classes(class_words(declared), index, empty=empty, remarks=remarks)
    names = class_words(ordered)
    told = (
        [f"only a number tells its classes apart, {names[0]} … {names[-1]}; {_WORDS_NEEDED}"]
        if _numbered(names)
        else []
    )
    return _Classes(names, {word: i for i, word in enumerate(ordered)}, remarks=told)


def _why(label: str, numbers: Mapping[str, int], declared: tuple[str, ...] | None, count: int) -> str:
    """Return why a label among numbers is no index of a name."""
    if label not in numbers:
        return f"label {label!r} is not a number, as others are"
    if declared is not None and 0 <= numbers[label] < len(declared):
        return f"its class, {declared[numbers[label]]!r}, is not among the class names"
    last = (count if declared is None else len(declared)) - 1
    if last < 0:
        return f"label {label}: no label of the data is a class (labels that are kept back are often -1)"
    return f"label {label} is not in 0 … {last}"


def _numbered(names: Sequence[str]) -> bool:
    """Whether names differ in their numbers only: class 0, class 1 …"""
    return len(names) > 1 and len({re.sub("[0-9]+", "", name) for name in names}) == 1


def _by_name(source: str, words: Sequence[str], names: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """Return word → index of the name that it means, and what to remark about it."""
    remarks = list[str]()
    return _matches(words, names) or _in_order(source, words, names, remarks), remarks


def _matches(words: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Return the words that names have, as they are or as they are compared → index of the name."""
    exact, plain = {name: i for i, name in enumerate(names)}, _plain(names)
    places = {same: i for i, same in enumerate(plain) if plain.count(same) == 1}
    meant = {word: exact.get(word, places.get(same)) for word, same in zip(words, _plain(words), strict=True)}
    return {word: i for word, i in meant.items() if i is not None}


def _in_order(source: str, words: Sequence[str], names: Sequence[str], remarks: list[str]) -> dict[str, int]:
    """Pair words with names in their order, where there are as many and nobody could order the words differently."""
    if len(words) != len(names):
        return {}
    if not _one_order(words):
        raise DataError(
            f"{source}: none of its classes is called by one of the class names, and their order is not clear: "
            f"{and_more(words, 3)}",
            hint=_TABLE % words[0],
        )
    pairs = [f"{word} is {name!r}" for word, name in zip(words, names, strict=True)]
    shown = " … ".join([", ".join(pairs[:2]), *pairs[2:][-1:]])
    remarks.append(f"class names are taken in the order of the classes: {shown}")
    return {word: i for i, word in enumerate(words)}


def plain_name(name: str) -> str:
    """Return a class name as it is compared: blind to case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]+", "", name.lower())


def _plain(names: Sequence[str]) -> list[str]:
    return [plain_name(name) for name in class_words(names)]


def _one_order(words: Sequence[str]) -> bool:
    """Whether the order of words is clear: not that of texts where numbers would come in another.

    Words that count from 0 or from 1, and have nothing else that differs, are clear in the order of their numbers.
    """
    by_number = sorted(words, key=natural)
    counted = [re.findall(r"[0-9]+", word) for word in words]
    if _numbered(words) and all(len(found) == 1 for found in counted):
        numbers = sorted(int(found[0]) for found in counted)
        counts = numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        return counts and list(words) == by_number
    return sorted(words) == by_number or list(words) not in (sorted(words), by_number)
