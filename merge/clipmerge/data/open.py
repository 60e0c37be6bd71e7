"""Open a DATA text such as `digits#test@rotate:20` as a Split."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from clipmerge.data.classes import Names, settle_classes
from clipmerge.data.prompts import templates as resolve_templates
from clipmerge.data.readers import read
from clipmerge.data.sampling import fraction_of, held_out, limited
from clipmerge.data.shifts import Shift, parse_shift
from clipmerge.data.split import Split
from clipmerge.data.stored import refuse, survey
from clipmerge.errors import DataError
from clipmerge.text import numbered_twins
from clipmerge.types import Progress

__all__ = ["open_split", "parse_source"]


def open_split(
    source: str | Path,
    *,
    classnames: Names | None = None,
    templates: str | Path | Sequence[str] | None = None,
    role: str | None = None,
    holdout: str | float | None = None,
    keep: Literal["holdout", "rest"] = "holdout",
    limit: int | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> Split:
    """Open the images that a DATA text names: `SOURCE[#part][@shift[:value]]…`, as in `digits#test@rotate:20`.

    `#part[:30%]` or `#part[:500]` takes that many of the part, spread evenly over classes.

    SOURCE is a folder of class folders, a `.csv` or `.tsv` of paths, an `.npz`, WebDataset shards in CLIP_benchmark's
    layout (a folder, `{0000..0099}.tar`, `a.tar::b.tar`, also compressed), Parquet as Hugging Face stores images, a
    folder of WILDS, `torchvision:CIFAR10:ROOT` or `digits`. An image with several captions is an item for each.

    Args:
        classnames: a file (one name per line, a JSON list, or a JSON object from the data's words to names),
            "imagenet", or the names themselves.
        templates: prompts for these images, as `data.prompts.templates` takes them, whatever a checkpoint records.
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
    if not text.strip():
        raise DataError("the name of the images is empty", hint="is a variable of the shell unset?")
    place, part, shifts = parse_source(text)
    part, most = _part_and_limit(part, text)
    raw, index, taken = read(place, part, role or ("train" if holdout is not None else "test"))
    names = [raw.names[i] for i in index]
    split = Split(
        source=text,
        classes=(),
        labels=np.full(len(index), -1, np.int64),
        names=numbered_twins(names),
        images=raw.images,
        index=index if raw.which is None else np.asarray(raw.which, np.int64)[index],
        groups=None if raw.groups is None else np.asarray(raw.groups, np.int64)[index],
        group_names=raw.group_names,
        captions=None if raw.captions is None else tuple(raw.captions[i] for i in index),
        templates=raw.templates if templates is None else resolve_templates(templates),
        given=frozenset() if templates is None else frozenset({"templates"}),
        part=taken,
        remarks=tuple(raw.remarks),
    )
    split, unusable = settle_classes(split, raw, classnames, index)
    chosen = np.ones(len(split), bool)
    if holdout is not None:
        chosen = held_out(names, fraction_of(holdout)) == (keep == "holdout")
    if raw.labels is not None:
        chosen &= split.labels >= 0
    if most is not None:
        share = max(1, round(most * chosen.sum())) if isinstance(most, float) else most
        limit = share if limit is None else min(limit, share)
    split = _usable(split.subset(np.flatnonzero(chosen)), unusable, limit, skip_bad, on_progress)
    return replace(split, shifts=tuple(shifts), remarks=(*split.remarks, *_duplicates(split)))


def _part_and_limit(part: str | None, text: str) -> tuple[str | None, float | int | None]:
    """Cut `train[:30%]` into `train` and .3, and `train[:500]` into `train` and 500.

    Raises:
        DataError: what stands in the brackets is neither.
    """
    if part is None or not part.endswith("]"):
        return part, None
    name, _, most = part[:-1].partition("[")
    if most == ":100%":
        return name, None
    with suppress(DataError):
        if most.startswith(":") and most.endswith("%"):
            return name, fraction_of(most[1:])
    if most.startswith(":") and most[1:].isdigit() and int(most[1:]):
        return name, int(most[1:])
    raise DataError(f"{text}: [{most}] is no share of the images", hint="write #train[:30%] or #train[:500]")


def _duplicates(split: Split) -> list[str]:
    """Say how many images are there twice, where that is known without reading them again."""
    pairs = () if split.stored_keys is None else split.duplicates
    if not pairs:
        return []
    other = sum(split.labels[i] != split.labels[first] for i, first in pairs)
    classes = f", {other} of them with another class" if other else ""
    images = "1 image has" if len(pairs) == 1 else f"{len(pairs)} images have"
    first, original = (split.names[i] for i in pairs[0])
    return [f"{images} the content of another{classes}: {first} is {original}"]


def _usable(
    split: Split, unusable: list[str], limit: int | None, skip_bad: bool, on_progress: Progress | None
) -> Split:
    """Return the items that can be used, `limit` of them; refuse all that cannot, unless they are skipped."""
    if limit is not None and not skip_bad:
        split = limited(split, limit)
    in_files = len(split) > 0 and split.images.stamp(int(split.index[0])) is not None
    if skip_bad or in_files:
        keys, reasons = survey(split.images, split.index, fully=skip_bad, on_progress=on_progress)
        unusable = unusable + [f"{split.names[i]}: {reason}" for i, reason in reasons.items()]
        split = replace(split, stored_keys=keys).subset(np.delete(np.arange(len(split)), list(reasons)))
    if not skip_bad:
        refuse(split.source, unusable)
    if not len(split):
        hint = "ask for a larger part, or look at the data"
        raise DataError(f"{split.source}: no image is left to use", hint=hint)
    split = replace(split, skipped=tuple(unusable))
    return split if limit is None else limited(split, limit)


def parse_source(text: str) -> tuple[str, str | None, list[Shift]]:
    """Cut `SOURCE#part@shift@shift` into SOURCE, part or None, and shifts; a path that exists is never cut."""
    place, shifts = text, list[Shift]()
    while not Path(place).exists():
        cut = max(place.rfind("#"), place.rfind("@"))
        if cut < 0 or "/" in place[cut:]:
            break
        place, sign, word = place[:cut], place[cut], place[cut + 1 :]
        if sign == "#":
            return place, word, shifts
        shifts.insert(0, parse_shift(word))
    return place, None, shifts
