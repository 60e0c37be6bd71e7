"""Names of classes: from the data, from a file, or ImageNet's for WordNet ids."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.check import Bad
from clipmerge.errors import DataError
from clipmerge.text import nearest

if TYPE_CHECKING:
    from clipmerge.data.found import Found

Labels = npt.NDArray[np.int64]
Names = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A file, "imagenet", names in the order of labels, or the data's words (or numbers) → one name or several."""

_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)
class Resolved:
    """Labels as indices into `classes`, -1 where an item is among the bad."""

    classes: tuple[str, ...]
    labels: Labels
    subset: Labels | None = None
    bad: list[Bad] = field(default_factory=list)
    counts_as: Labels | None = None


def resolve(found: "Found", classnames: Names | None = None) -> Resolved:
    """Names and indices for what an adapter found.

    Labels that are numbers are indices. Labels that are words are matched with the names given (blind to
    case, `_` and `-`), or stand for them in sorted order where none matches and there are as many of both.
    """
    given = None if classnames is None else names_from(classnames)
    if found.labels is None:
        return Resolved((), np.full(len(found.names), -1, np.int64), None, list(found.bad))
    labels = found.labels
    if isinstance(given, Mapping):
        return _translated(found, [str(label) for label in labels], given)
    if isinstance(labels, np.ndarray):
        return _numbered(found, labels.astype(np.int64), given, found.classes)
    words = found.classes or tuple(sorted(set(labels)))
    if given is None and all(_WORDNET.fullmatch(w) for w in words):
        return _wordnet(found, list(labels), words)
    if all(w.isdecimal() for w in words):
        return _numbered(found, np.array([int(w) for w in labels], np.int64), given, None)
    if given is None:
        names = tuple(w.replace("_", " ") for w in words)
        return _named(found, list(labels), words, names, {w: i for i, w in enumerate(words)})
    return _named(found, list(labels), words, given, _matches(words, given))


def names_from(classnames: Names) -> tuple[str, ...] | Mapping[str, tuple[str, ...]]:
    """The names in a file (one a line, or JSON), ImageNet's for "imagenet", or those given.

    Raises:
        DataError: no such file, or no names in it, or a name twice.
    """
    if isinstance(classnames, str) and classnames == "imagenet":
        return imagenet_names()
    if isinstance(classnames, str | Path):
        source, read = str(classnames), _read(Path(classnames))
    else:
        source, read = "class names", classnames
    if isinstance(read, Mapping):
        return {word: (name,) if isinstance(name, str) else tuple(name) for word, name in read.items()}
    names = tuple(map(str, read))
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if not names or twice:
        problem = f"names {twice[0]!r} twice" if twice else "holds no names"
        hint = "one class name a line, each once, in the order of the labels"
        raise DataError(f"{source} {problem}", hint=hint)
    return names


def imagenet_names() -> tuple[str, ...]:
    """The 1000 names that CLIP is prompted with."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def _read(path: Path) -> Sequence[str] | Mapping[str, str | Sequence[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(
            f"class names cannot be read from {path}: {reason}",
            hint="give a text file with one name a line, a JSON list, or the word imagenet",
        ) from error
    if text.lstrip()[:1] in ("[", "{"):
        try:
            parsed: list[str] | dict[str, str | list[str]] = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} is not JSON: {error}", hint="a list of names, or an object from words to names"
            ) from error
        return parsed
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _numbered(
    found: "Found", labels: Labels, given: tuple[str, ...] | None, declared: Sequence[str] | None
) -> Resolved:
    """Labels that are indices. Without any names the numbers are the names."""
    known = given or declared
    names = tuple(map(str, range(int(labels.max(initial=-1)) + 1))) if known is None else tuple(known)
    outside = (labels < 0) | (labels >= len(names))
    bad = list(found.bad) + [
        Bad(found.names[int(i)], f"label {labels[i]} is not in 0 … {len(names) - 1}")
        for i in np.flatnonzero(outside)
    ]
    bad += [Bad(f"class {word!r}", "no images") for word in found.empty]
    present = {int(label) for label in [*labels[~outside], *found.elsewhere] if 0 <= int(label) < len(names)}
    if given is None and declared is not None:
        bad += [Bad(f"class {name!r}", "no images") for c, name in enumerate(names) if c not in present]
    return Resolved(names, np.where(outside, -1, labels), _subset(present, len(names)), bad)


def _named(
    found: "Found", labels: list[str], words: Sequence[str], names: tuple[str, ...], index: dict[str, int]
) -> Resolved:
    """Labels that are words, through `index` from word to place in `names`."""
    bad = list(found.bad) + [Bad(f"class {w!r}", _unknown(w, names)) for w in words if w not in index]
    bad += [Bad(f"class {w!r}", "no images") for w in found.empty]
    numbers = np.array([index.get(label, -1) for label in labels], np.int64)
    present = {index[str(word)] for word in [*labels, *found.elsewhere] if str(word) in index}
    return Resolved(names, numbers, _subset(present, len(names)), bad)


def _wordnet(found: "Found", labels: list[str], ids: Sequence[str]) -> Resolved:
    """WordNet ids: ImageNet-1k's full list of names where the data touches it, else names from WordNet."""
    from timm.data.imagenet_info import ImageNetInfo

    imagenet: Any = ImageNetInfo("imagenet-1k")
    order = {w: i for i, w in enumerate(imagenet.label_names())}
    if any(w in order for w in ids):
        return _named(found, labels, ids, imagenet_names(), {w: order[w] for w in ids if w in order})
    lemmas: Any = ImageNetInfo("imagenet-22k")
    known = set(lemmas.label_names())
    if not all(w in known for w in ids):
        known = set()
    names = tuple(lemmas.label_name_to_description(w).split(",")[0] if w in known else w for w in ids)
    return _named(found, labels, ids, names, {w: i for i, w in enumerate(ids)})


def _translated(found: "Found", labels: list[str], table: Mapping[str, tuple[str, ...]]) -> Resolved:
    """Words by a table of names; ImageNet's full head where all of the names are ImageNet's."""
    spoken = tuple(dict.fromkeys(name for names in table.values() for name in names))
    imagenet = imagenet_names()
    names = imagenet if set(spoken) <= set(imagenet) else spoken
    place = {name: i for i, name in enumerate(names)}
    index = {word: place[meant[0]] for word, meant in table.items() if meant}
    words = tuple(dict.fromkeys([*(found.classes or ()), *labels])) if _words(found) else sorted(set(labels))
    named = _named(found, labels, words, names, index)
    counts: dict[int, int] = {}
    for word in sorted({*labels, *map(str, found.elsewhere)} & index.keys()):
        for name in table[word]:
            if counts.setdefault(place[name], index[word]) != index[word]:
                raise DataError(
                    f"class names: {name!r} stands for {word!r} and for another word with another first name",
                    hint="words that share a name must share the first of their names",
                )
    subset = np.array(sorted(counts), np.int64)
    target = np.array([counts[int(c)] for c in subset], np.int64)
    if (target == subset).all():
        return Resolved(names, named.labels, _subset(set(counts), len(names)), named.bad)
    return Resolved(names, named.labels, subset, named.bad, target)


def _words(found: "Found") -> bool:
    return not isinstance(found.labels, np.ndarray)


def _matches(words: Sequence[str], names: tuple[str, ...]) -> dict[str, int]:
    """Word → index of the name that it means."""
    places = {_plain(name): i for i, name in enumerate(names)}
    index = {w: places[_plain(w)] for w in words if _plain(w) in places}
    if not index and len(words) == len(names):
        return {w: i for i, w in enumerate(sorted(words))}
    return index


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _unknown(word: str, names: tuple[str, ...]) -> str:
    close = nearest(word, names)
    return "not among the class names" + (f" (did you mean {close!r}?)" if close else "")


def _subset(present: set[int], total: int) -> Labels | None:
    return None if len(present) == total else np.array(sorted(present), np.int64)
