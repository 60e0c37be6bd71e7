"""Retrieval: for each image its captions, for each caption its image, by the cosine of their features.

Source: recall@k as Karpathy & Fei-Fei 2015 (arXiv 1412.2306) and CLIP_benchmark count it: the share of queries that
have a right answer among their first k.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from clipmerge.types import Bools, Ints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["RECALLS", "Ranks", "rank_pairs", "recall", "recall_interval"]

_RESAMPLES = 200
_CELLS = 2**24
"""Similarities held at once: 128 MiB in fp64."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many wrong answers stand before the first right one: 0 is a right answer in first place.

    Attributes:
        texts: (images,) captions of other images before the best of an image's own.
        images: (captions,) other images before a caption's own.
        image_of: (captions,) each caption's image.
    """

    texts: Ints
    images: Ints
    image_of: Ints

    @property
    def first(self) -> Bools:
        """Whether each query, images and then captions, has a right answer in first place."""
        return np.concatenate([self.texts, self.images]) < 1


def recall(ranks: Ranks, *, k: int, of: str) -> float:
    """Return the share of queries with a right answer among the first `k`.

    Args:
        of: what is retrieved: "text" (for each image), "image" (for each caption), "both" (the mean of the two).
    """
    text, image = float((ranks.texts < k).mean()), float((ranks.images < k).mean())
    return {"text": text, "image": image, "both": (text + image) / 2}[of]


RECALLS: "Mapping[str, tuple[Callable[[Ranks], float], str]]" = {
    f"{of}_recall@{k}" if of != "both" else f"recall@{k}": (
        partial(recall, k=k, of=of),
        f"{of} recall@{k}" if of != "both" else f"recall@{k}",
    )
    for of in ("both", "text", "image")
    for k in (1, 5, 10)
}
"""Metric → how it is computed, and its words in a table. `recall@k` is the mean of both directions."""


def recall_interval(compute: "Callable[[Ranks], float]", ranks: Ranks) -> tuple[float, float]:
    """Compute a 95 % bootstrap interval over images, each with all its captions: those of one image depend on it."""
    draws, n = np.random.default_rng(0), len(ranks.texts)
    order = np.argsort(ranks.image_of, kind="stable")
    ends = np.cumsum(np.bincount(ranks.image_of, minlength=n))
    own = np.split(order, ends[:-1])
    values = []
    for _ in range(_RESAMPLES):
        drawn = draws.integers(0, n, n)
        captions = np.concatenate([own[i] for i in drawn.tolist()])
        values.append(compute(Ranks(ranks.texts[drawn], ranks.images[captions], ranks.image_of[captions])))
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def rank_pairs(
    images: "Float[Tensor, 'images d']",
    texts: "Float[Tensor, 'texts d']",
    text_of: "Int[Tensor, ' captions']",
    image_of: "Int[Tensor, ' captions']",
) -> Ranks:
    """Rank every caption for every image, and every image for every caption.

    A tie counts against: a wrong answer that is as near as the right one stands before it, so a model that maps all to
    one point scores 0. A caption that several images have is right for each of them.

    Args:
        images, texts: unit features in fp64, or fp32 where the device has no other; each text is there once.
        text_of, image_of: each caption's text and image.
    """
    import torch

    tie = 1e-12 if images.dtype == torch.float64 else 1e-6  # wider than what the order of a sum changes
    times = torch.bincount(text_of, minlength=len(texts)).to(images)
    by_image, by_caption = [], []
    size = max(1, _CELLS // len(texts))
    for start in range(0, len(images), size):
        near = images[start : start + size] @ texts.T
        mine = (image_of >= start) & (image_of < start + size)
        own = torch.zeros_like(near, dtype=torch.bool)
        own[image_of[mine] - start, text_of[mine]] = True
        best = near.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        by_image.append(((near > best - tie) & ~own).to(times) @ times)
    size = max(1, _CELLS // len(images))
    for start in range(0, len(text_of), size):
        near = texts[text_of[start : start + size]] @ images.T
        best = near.gather(1, image_of[start : start + size, None])
        by_caption.append((near > best - tie).sum(dim=1) - 1)
    ranks = [torch.cat(column).long().cpu().numpy() for column in (by_image, by_caption)]
    return Ranks(ranks[0], ranks[1], image_of.cpu().numpy())
