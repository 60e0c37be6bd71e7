"""Choose items by hashes of their names: held out, a balanced few, k of each class. The same on every machine."""

from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from clipmerge.data.split import Split
from clipmerge.errors import DataError
from clipmerge.text import and_more
from clipmerge.types import Bools

__all__ = ["few_shot", "fraction_of", "held_out", "limited", "name_hash"]


def name_hash(name: str, salt: str = "") -> int:
    """Return 64 bits that depend on nothing but the name and the salt."""
    return int.from_bytes(blake3(f"{salt}\0{name}".encode()).digest(8), "big")


def fraction_of(text: str | float) -> float:
    """Parse "2%", or 0.02, as 0.02.

    Raises:
        DataError: not a number, or not between 0 and 1.
    """
    raw = str(text).strip()
    try:
        value = float(raw[:-1]) / 100 if raw.endswith("%") else float(raw)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise DataError(f"{raw!r} is not a part to hold out", hint="write a percentage such as 2%, or 0.02")
    return value


def held_out(names: Sequence[str], fraction: float) -> Bools:
    """Return (n,) whether each item is held out: its name's hash falls below `fraction` of the range."""
    border = int(fraction * 2**64)
    return np.fromiter((name_hash(name, "holdout") < border for name in names), np.bool_, len(names))


def limited(split: Split, n: int) -> Split:
    """Return at most `n` images, in their own order.

    Classes take turns, so that each gives as many as the others while it has any; inside a class the hash of
    the name decides.

    Raises:
        DataError: `n` is below 1.
    """
    if n < 1:
        raise DataError(f"a limit of {n} leaves no image", hint="--limit takes 1 or more")
    if n >= split.pictures:
        return split
    if split.pictures < len(split):  # an image keeps all its captions
        _, first = np.unique(split.index, return_index=True)
        chosen = limited(split.subset(np.sort(first)), n).index
        return split.subset(np.flatnonzero(np.isin(split.index, chosen)))
    turns = sorted((rank, order, i) for i, (rank, order) in enumerate(_ranks(split, "limit")))
    return split.subset(np.sort(np.array([i for _, _, i in turns[:n]], dtype=np.int64)))


def few_shot(split: Split, k: int, seed: int = 0) -> Split:
    """Return `k` images of each class, drawn by a hash of name and seed, in their own order.

    Raises:
        DataError: a class has fewer than `k`.
    """
    counts = np.bincount(split.labels[split.labels >= 0], minlength=len(split.classes))
    covered = range(len(split.classes)) if split.class_subset is None else split.class_subset.tolist()
    short = [f"{split.classes[c]} ({counts[c]})" for c in covered if counts[c] < k]
    if k < 1 or short or not len(split.classes):
        raise DataError(
            f"{split.source}: {k} images of each class are not there: {and_more(short, 10) or 'no classes'}",
            hint="ask for fewer shots, at least 1",
        )
    return split.subset([i for i, (rank, _) in enumerate(_ranks(split, f"shot {seed}")) if rank < k])


def _ranks(split: Split, salt: str) -> list[tuple[int, int]]:
    """Return for each item its place in its class by hash of the name, and that hash."""
    hashes = [name_hash(name, salt) for name in split.names]
    taken: dict[int, int] = {}
    ranks = [(0, 0)] * len(split)
    for i in sorted(range(len(split)), key=hashes.__getitem__):
        label = int(split.labels[i])
        ranks[i] = (taken.get(label, 0), hashes[i])
        taken[label] = ranks[i][0] + 1
    return ranks
