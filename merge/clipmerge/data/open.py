"""Open a DATA text such as `digits#test@rotate:20` as a Split."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from clipmerge.data.adapters import find
from clipmerge.data.check import Bad, distinct, refuse, unreadable
from clipmerge.data.choose import fraction_of, held_out, limited
from clipmerge.data.classes import Names, resolve
from clipmerge.data.shifts import parse_shift, shifted
from clipmerge.data.split import Split
from clipmerge.errors import DataError
from clipmerge.types import Progress

__all__ = ["open_split", "parse_source"]


def open_split(
    source: str | Path,
    *,
    classnames: Names | None = None,
    role: str | None = None,
    holdout: str | float | None = None,
    keep: Literal["holdout", "rest"] = "holdout",
    limit: int | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> Split:
    """The images that a DATA text names: `SOURCE[#part][@shift[:value]]…`, as in `digits#test@rotate:20`.

    SOURCE is a folder of class folders, a `.csv` or `.tsv`, an `.npz`, a folder of WebDataset shards in
    CLIP_benchmark's layout, Parquet as Hugging Face stores images, `torchvision:CIFAR10:ROOT` or `digits`.

    Args:
        classnames: a file (one name a line, a JSON list, or a JSON object from the data's words to names),
            "imagenet", or the names themselves.
        role: the part to take where the text names none: "train", "val" or "test" (the default).
        holdout: "2%" or 0.02 of the items; a hash of the item's name decides which.
        keep: the held-out items, or the rest.
        limit: at most so many images, spread evenly over classes, by hash of the name inside a class.
        skip_bad: leave out what cannot be used instead of refusing it; decodes every image once to find out.
        on_progress: called as (what, done, total).

    Raises:
        DataError: no such data, or items that cannot be used; all of them are counted, ten are named.
    """
    text = str(source)
    place, part, shifts = parse_source(text)
    wanted = role or ("train" if holdout is not None else "test")
    found = find(place, part, wanted)
    resolved = resolve(found, classnames)
    split = Split(
        source=text,
        classes=resolved.classes,
        labels=resolved.labels,
        names=distinct(found.names),
        images=found.images,
        groups=None if found.groups is None else np.asarray(found.groups, np.int64),
        group_names=found.group_names,
        captions=None if found.captions is None else tuple(found.captions),
        class_subset=resolved.subset,
        counts_as=resolved.counts_as,
        templates=found.templates,
    )
    chosen = np.ones(len(split), bool) if holdout is None else held_out(found.names, fraction_of(holdout))
    if keep == "rest" and holdout is not None:
        chosen = ~chosen
    if found.labels is not None:
        chosen &= resolved.labels >= 0
    split = _usable(split.subset(np.flatnonzero(chosen)), resolved.bad, limit, skip_bad, on_progress)
    for shift in shifts:
        split = shifted(split, shift)
    return split


def _usable(
    split: Split, bad: list[Bad], limit: int | None, skip_bad: bool, on_progress: Progress | None
) -> Split:
    """The items that can be used, `limit` of them; one error for all that cannot, unless they are skipped."""
    if limit is not None and not skip_bad:
        split = limited(split, limit)
    broken = unreadable(split.images, split.names, fully=skip_bad, on_progress=on_progress)
    bad = [*bad, *broken.values()]
    if not skip_bad:
        refuse(split.source, bad)
    split = split.subset([i for i in range(len(split)) if i not in broken]) if broken else split
    split = replace(split, skipped=tuple(f"{b.item}: {b.reason}" for b in bad))
    if not len(split):
        hint = "ask for a larger part, or look at the data"
        raise DataError(f"{split.source}: no image is left to use", hint=hint)
    return split if limit is None else limited(split, limit)


def parse_source(text: str) -> tuple[str, str | None, list[str]]:
    """`SOURCE#part@shift@shift` → SOURCE, part or None, shifts; a path that exists is never cut."""
    place, shifts = text, list[str]()
    while not Path(place).exists():
        cut = max(place.rfind("#"), place.rfind("@"))
        if cut < 0 or "/" in place[cut:]:
            break
        place, sign, word = place[:cut], place[cut], place[cut + 1 :]
        if sign == "#":
            return place, word, shifts
        parse_shift(word)
        shifts.insert(0, word)
    return place, None, shifts
