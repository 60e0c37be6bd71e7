"""Task vectors before a merge: what is measured, against numpy on the whole tensors, and what is warned of."""

from collections.abc import Callable

import numpy as np
import pytest

from clipmerge.errors import RecipeError
from clipmerge.weights import blocks
from clipmerge.weights.task_vectors import compare_tasks, summary_rows
from clipmerge.weights.weights import Weights

Point = Callable[..., Weights]
NAMES = (
    "visual.conv1.weight",
    "visual.transformer.resblocks.0.x",
    "transformer.resblocks.0.y",
    "logit_scale",
)


@pytest.fixture
def made() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(NAMES, (40, 7)) | {"logit_scale": ()}
    drawn = [{n: rng.standard_normal(s).astype("f4") for n, s in shapes.items()} for _ in range(4)]
    for model in drawn[1:]:
        model["visual.conv1.weight"][:5] = drawn[0]["visual.conv1.weight"][:5]  # left alone: zeros
    return drawn


def test_by_an_independent_formula(made, point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 128)  # several stretches for a tensor
    base, *models = (point(n, **tensors) for n, tensors in zip(("base", "a", "b", "c"), made, strict=True))
    found = compare_tasks(base, models)
    assert found.tasks == ("a", "b", "c")
    groups = {
        ("visual", None): NAMES[:1], ("visual", 0): NAMES[1:2], ("text", 0): NAMES[2:3], ("other", None): NAMES[3:],
        (None, None): NAMES,
    }  # fmt: skip
    parts = {(p.tower, p.block): p for p in (*found.parts, found.whole)}
    assert parts.keys() == groups.keys()
    for key, names in groups.items():
        vectors = [
            np.concatenate([np.ravel(m[n] - made[0][n]) for n in names]).astype("f8") for m in made[1:]
        ]
        part = parts[key]
        np.testing.assert_allclose(part.norms, [np.linalg.norm(v) for v in vectors], rtol=1e-6)
        for i, u in enumerate(vectors):
            for j, v in enumerate(vectors):
                cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
                assert part.cosines[i][j] == pytest.approx(cosine, rel=1e-6)
                held = (u != 0) & (v != 0)
                assert part.conflicts[i][j] == pytest.approx(np.mean((u * v)[held] < 0), abs=1e-12)
    assert found.zeros == pytest.approx([35 / (3 * 280 + 1)] * 3)
    assert found.warnings == ()
    rows = {name: facts for name, _, facts in summary_rows(found)}
    pairs = [found.whole.cosines[i][j] for i, j in ((1, 0), (2, 0), (2, 1))]
    assert rows["all"]["cosine"] == pytest.approx(np.mean(pairs))
    assert (rows["all"]["least"], rows["all"]["largest"]) == (min(pairs), max(pairs))
    assert list(rows) == ["visual", "visual.block[0]", "text.block[0]", "other", "all"]


def test_task_vectors_and_models_may_be_given(made, point: Point) -> None:
    base, a, b, _ = (point(n, **tensors) for n, tensors in zip(("base", "a", "b", "c"), made, strict=True))
    assert compare_tasks(base, [a - base, b]).whole == compare_tasks(base, [a, b]).whole


def test_rounded_files_are_told_by_their_zeros(point: Point) -> None:
    """A finetuning of 1e-4 on weights of 0.03, read from bf16 files: two fifths of it are exactly 0."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(20_000) * 0.03
    ends = [start + 1e-4 * rng.standard_normal(20_000) for _ in range(2)]
    exact = compare_tasks(point("zs", x=start), [point(n, x=e) for n, e in zip("ab", ends, strict=True)])
    assert exact.warnings == ()
    rounded = compare_tasks(
        point("zs", x=("BF16", start)), [point(n, x=("BF16", e)) for n, e in zip("ab", ends, strict=True)]
    )
    assert 0.35 < rounded.zeros[0] < 0.5
    assert rounded.warnings[0].startswith(
        "40% of what a changed is exactly 0: its file, or the base's, was rounded"
    )


def test_what_is_frozen_is_not_counted_as_rounded(point: Point) -> None:
    base = point("zs", x=[1.0, 2.0], frozen=np.zeros(100))
    models = [point(n, x=[1.5, 2.0 + i], frozen=np.zeros(100)) for i, n in enumerate("ab", 1)]
    assert compare_tasks(base, models).zeros == (0.0, 0.0)


def test_a_vector_that_is_much_longer_is_named_with_what_helps(point: Point) -> None:
    base = point("zs", x=[0.0])
    found = compare_tasks(base, [point(n, x=[v]) for n, v in (("a", 1.0), ("b", -1.0), ("c", 5.0))])
    (warning,) = found.warnings
    assert warning.startswith("the task vector of c is 5.0 times as long as the median: tsv, iso_c")
    assert "equalise" in warning
    assert found.whole.conflicts[0][1] == 1
    (warning,) = compare_tasks(base, [point("a", x=[1.0]), base]).warnings
    assert warning == "zs is the base: its task vector is zero"


def test_one_task_has_nothing_to_agree_with(point: Point) -> None:
    with pytest.raises(RecipeError, match="compared with each other"):
        compare_tasks(point("zs"), [point("a")])
