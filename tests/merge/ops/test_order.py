"""Order statistics of a stream are those of a full sort."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from clipmerge.ops.order import Blocks, count_of, kth_largest, kth_largest_of_stream


def stream(vectors: Sequence[np.ndarray], piece: int, sampled: int) -> tuple[Blocks, list[bool]]:
    passes: list[bool] = []

    def blocks(function: Callable[..., list[np.ndarray]], sample: bool) -> list[list[np.ndarray]]:
        passes.append(sample)
        length = sampled if sample else piece
        return [
            function([v[low : low + length] for v in vectors]) for low in range(0, len(vectors[0]), piece)
        ]

    return blocks, passes


def normal(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(20_000).astype(np.float32)


def mostly_zero(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(20_000) < 0.05, normal(rng), np.float32(0))


def few_values(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-2, 3, 20_000).astype(np.float32)


def ascending(rng: np.random.Generator) -> np.ndarray:
    """The samples, each from the beginning of a piece, mislead."""
    return np.sort(np.abs(normal(rng))).reshape(-1, 100)[::-1].T.reshape(-1).copy()


@pytest.mark.parametrize("make", [normal, mostly_zero, few_values, ascending])
def test_by_a_full_sort(make: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    vectors = [make(rng) for _ in range(3)]
    ranks = [[1, 4000, 20_000], [2, 10_000], [19_999]]
    blocks, passes = stream(vectors, 1000, 20)
    expected = [[np.sort(np.abs(v))[-r] for r in of_v] for v, of_v in zip(vectors, ranks, strict=True)]
    assert kth_largest_of_stream(blocks, ranks, 20_000) == expected
    assert passes[0]
    assert not any(passes[1:])


def test_one_pass_is_enough_for_ordinary_numbers() -> None:
    vectors = [normal(np.random.default_rng(i)) for i in range(2)]
    blocks, passes = stream(vectors, 1000, 100)
    kth_largest_of_stream(blocks, [[4000]] * 2, 20_000)
    assert passes == [True, False]


def test_shares_count_as_the_decimals_that_they_print_as() -> None:
    assert count_of(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996 in floats
    assert (count_of(3, 0.2), count_of(0, 0.2), count_of(5, 1.0)) == (1, 0, 5)
    assert kth_largest(np.array([[1.0, -3.0], [2.0, 0.0]]), 2) == 2.0
    assert kth_largest(np.empty(0), 1) == 0.0
