"""Name weights for tables and results as their files are called on disk."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipmerge.checkpoint.index import SUFFIX
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.text import numbered_twins
from clipmerge.weights.expression import Leaf
from clipmerge.weights.weights import Weights

__all__ = ["names_of"]


def names_of(weights: Sequence[Weights]) -> list[str]:
    """Name weights as their files are called on disk, with as much of the path as tells them apart.

    Sums are named by their notation. What is given twice is "a" and "a (2)".
    """
    called = [_texts(each) for each in weights]
    distinct = {texts[-1]: texts for texts in called}
    names = {full: texts[0] for full, texts in distinct.items()}
    for depth in range(1, max(map(len, called), default=0)):
        clashing = {name for name, count in Counter(names.values()).items() if count > 1}
        for full, texts in distinct.items():
            if names[full] in clashing:
                names[full] = texts[min(depth, len(texts) - 1)]
    return list(numbered_twins(names[texts[-1]] for texts in called))


def _texts(weights: Weights) -> list[str]:
    """List what a checkpoint may be called: its file's stem, the file's name, and both below ever more folders."""
    only = next((leaf for leaf in weights.terms if _is_that(weights, leaf)), None)
    if not isinstance(only, Checkpoint) or only.path is None:
        return [repr(weights)]
    if (reference := only.extra.get("reference")) is not None:
        return [str(reference)]
    path, chosen = only.path.absolute(), only.extra.get("set")
    path = (
        path.parent if only.factors is not None and not path.is_dir() else path
    )  # all are adapter_model.safetensors
    stem = path.name if path.is_dir() else Path(path.name.removesuffix(SUFFIX)).stem
    folders = [Path(*path.parts[-depth:-1]) for depth in range(1, len(path.parts) + 1)]
    texts = [(folder / name).as_posix() for folder in folders for name in (stem, path.name)]
    return [f"{text}#{chosen}" if chosen else text for text in dict.fromkeys(texts)]


def _is_that(weights: Weights, leaf: Leaf) -> bool:
    """Whether the weights are one checkpoint, but for what completes it: the base of an adapter, or whole towers."""
    if len(weights.terms) == 1:
        return weights.terms[leaf].constant == 1
    if not isinstance(leaf, Checkpoint) or len(weights.terms) > 2:
        return False
    if leaf.factors is not None:
        return all(c.constant == 1 for c in weights.terms.values()) and weights.kind() == 1
    return all(c.at(name) == (other is leaf) for name in leaf.tensors for other, c in weights.terms.items())
