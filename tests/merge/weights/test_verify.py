"""A file proves itself: parents by content, the merge computed again, every bit compared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipmerge.errors import CheckpointError
from clipmerge.weights.methods import apply
from clipmerge.weights.record import write_record
from clipmerge.weights.verify import verify
from clipmerge.weights.weights import Weights, from_state_dict, interpolate, load, load_all, mean

Point = Callable[..., Weights]
Put = Callable[..., Path]


@pytest.fixture
def models(put: Put) -> list[Path]:
    rng = np.random.default_rng(0)
    shapes = {"visual.x": (7, 9), "text.x": (5,)}
    return [
        put(f"in/{name}", **{k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()})
        for name in ("base", "a", "b", "c")
    ]


def written(weights: Weights, tmp_path: Path, **options: object) -> Path:
    return weights.save(tmp_path / "out" / "merged.safetensors", **options)


@pytest.fixture(autouse=True)
def _out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()


def recipes(files: list[Path]) -> dict[str, Weights]:
    base, a, b, c = load_all(files)
    return {
        "soup": mean([a, b, c]),
        "weighted": mean([a, mean([b, c])]),
        "added": base + 0.4 * ((a - base) + (b - base)),
        "by tower": interpolate(base, a, {"visual": 0.123456789}),
        "vector": a - base,
        "methods": base
        + {"visual": 0.5}
        * apply("svc", [a - base, b - base], merged=apply("ties", [a - base, b - base], density=0.5)),
        "curved": 0.5 * apply("slerp", [mean([c, a, b]), base], alpha=0.3) + 0.5 * a,
    }


@pytest.mark.parametrize("kind", ["soup", "weighted", "added", "by tower", "vector", "methods", "curved"])
@pytest.mark.parametrize("dtype", [None, "F16", "BF16"])
def test_what_clipmerge_wrote_is_verified(
    models: list[Path], tmp_path: Path, kind: str, dtype: str | None
) -> None:
    path = written(recipes(models)[kind], tmp_path, dtype=dtype)
    found = verify(path, [models[0].parent])
    assert (found.status, found.tensor, found.missing) == ("verified", None, ())
    assert found.notation == repr(recipes(models)[kind])


def test_parents_are_known_by_content_whatever_they_are_called(models: list[Path], tmp_path: Path) -> None:
    path = written(recipes(models)["soup"], tmp_path)
    elsewhere = tmp_path / "deep" / "er"
    elsewhere.mkdir(parents=True)
    for number, file in enumerate(models):
        file.rename(elsewhere / f"renamed {number}.safetensors")
    found = verify(path, [tmp_path / "deep"])
    assert found.status == "verified"
    assert {name: file.name for name, file in found.parents.items()} == {
        "a": "renamed 1.safetensors", "b": "renamed 2.safetensors", "c": "renamed 3.safetensors",
    }  # fmt: skip


def test_the_files_own_folder_is_searched(models: list[Path]) -> None:
    path = mean(load_all(models)).save(models[0].parent / "soup.safetensors")
    assert verify(path).status == "verified"


def test_a_single_flipped_bit_is_named(models: list[Path], tmp_path: Path) -> None:
    path = written(recipes(models)["soup"], tmp_path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # "visual.x" comes last
    path.write_bytes(content)
    found = verify(path, [models[0].parent])
    assert (found.status, found.tensor) == ("differs", "visual.x")
    assert found.reason == "1 of the 63 elements of 'visual.x' differ"


@pytest.mark.parametrize(
    ("kind", "status"), [("curved", "verified"), ("methods", "verified"), ("soup", "differs")]
)
def test_a_rounding_is_counted_where_linear_algebra_is_in_it_and_a_difference_elsewhere(
    models: list[Path], tmp_path: Path, kind: str, status: str
) -> None:
    """As another machine would have written it: its library sums in another order."""
    path = written(recipes(models)[kind], tmp_path)
    assert verify(path, [models[0].parent]).rounded == 0
    content = bytearray(path.read_bytes())
    numbers = np.frombuffer(content, "f4", count=63, offset=len(content) - 4 * 63)  # "visual.x" comes last
    for place in (3, 40):
        numbers[place] = np.nextafter(numbers[place], np.float32(np.inf))
    path.write_bytes(content)
    found = verify(path, [models[0].parent])
    assert found.status == status
    if status == "verified":
        assert found.rounded == found.to_json()["rounded"] == 2
        assert found.reason.endswith("but for 2 of 68 elements, which differ by a rounding in linear algebra")
    numbers[7] *= 1.00001
    path.write_bytes(content)
    found = verify(path, [models[0].parent])
    assert (found.status, found.tensor, found.rounded) == ("differs", "visual.x", 0)


def test_methods_of_entries_stay_exact(models: list[Path], tmp_path: Path) -> None:
    base, a, b, _ = load_all(models)
    for name, status in (("ties", "differs"), ("magmax", "differs"), ("equalise", "verified")):
        operands = [a - base] if name == "equalise" else [a - base, b - base]
        path = written(base + apply(name, operands), tmp_path, force=True)
        content = bytearray(path.read_bytes())
        numbers = np.frombuffer(content, "f4", count=63, offset=len(content) - 4 * 63)
        numbers[3] = np.nextafter(numbers[3], np.float32(np.inf))
        path.write_bytes(content)
        assert verify(path, [models[0].parent]).status == status, name


def test_a_changed_record_does_not_pass(models: list[Path], tmp_path: Path, put: Put) -> None:
    path = written(recipes(models)["soup"], tmp_path)
    content = path.read_bytes().replace(b"mean([a, b, c])", b"sum([a, b, -c])")
    path.write_bytes(content)
    assert verify(path, [models[0].parent]).status == "differs"
    path.write_bytes(content.replace(b"sum([a, b, -c])", b"sum([a, b,  c])"))
    with pytest.raises(CheckpointError, match="its record cannot be computed again: total is 3"):
        verify(path, [models[0].parent])


def test_a_file_of_another_dtype_than_recorded_differs(models: list[Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = written(recipes(models)["soup"], tmp_path)
    metadata = dict(load(path).checkpoints[0].metadata)
    save_file({k: v.astype("f2") for k, v in load_file(path).items()}, path, metadata=metadata)
    found = verify(path, [models[0].parent])
    assert (found.status, found.reason) == ("differs", "'text.x' is F16 [5], not F32 [5]")


def test_progress_counts_the_bytes_compared(models: list[Path], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = written(recipes(models)["soup"], tmp_path)
    verify(path, [models[0].parent], on_progress=lambda *args: told.append(args))
    assert told[-1] == ("verifying", 272, 272)


def test_missing_parents_are_named_with_file_and_digest(models: list[Path], tmp_path: Path) -> None:
    path = written(recipes(models)["soup"], tmp_path)
    digest = verify(path).missing[1].digest
    models[2].unlink()
    found = verify(path, [models[0].parent])
    assert found.status == "missing"
    assert found.reason == "1 of 3 parents are missing"
    assert [(p.name, p.file, p.digest) for p in found.missing] == [("b", "b.safetensors", digest)]


def test_a_parent_that_changed_counts_as_missing(models: list[Path], tmp_path: Path, put: Put) -> None:
    path = written(recipes(models)["soup"], tmp_path)
    put("in/b", **{"visual.x": np.ones((7, 9), "f4"), "text.x": np.ones(5, "f4")})
    assert [p.name for p in verify(path, [models[0].parent]).missing] == ["b"]


def test_files_that_say_nothing_are_told_apart(models: list[Path], tmp_path: Path) -> None:
    assert verify(models[0]).status == "unrecorded"
    path = written(recipes(models)["soup"], tmp_path, digests=False)
    found = verify(path, [models[0].parent])
    assert (found.status, found.reason) == ("unrecorded", "the file was written without its parents' digests")


def test_what_was_written_from_memory_is_checked_against_its_digest(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = written(from_state_dict({"x": torch.arange(8.0)}, "trained"), tmp_path)
    assert verify(path).status == "verified"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert verify(path).status == "differs"


def test_rubbish_beside_the_parents_is_passed_over(models: list[Path], tmp_path: Path) -> None:
    folder = models[0].parent
    (folder / "broken.safetensors").write_bytes(b"\xff" * 20)
    (folder / "other.pt").write_text("no checkpoint")
    path = written(recipes(models)["soup"], tmp_path)
    assert verify(path, [folder]).status == "verified"


def test_a_folder_that_does_not_exist_is_a_mistake(models: list[Path], tmp_path: Path) -> None:
    path = written(recipes(models)["soup"], tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        verify(path, [tmp_path / "nowhere"])


def test_a_sharded_output_is_verified_through_its_index(models: list[Path], tmp_path: Path) -> None:
    path = written(recipes(models)["soup"], tmp_path, shard_size=100)
    assert verify(path, [models[0].parent]).status == "verified"


def test_hostile_notation_is_only_parsed(put: Put, tmp_path: Path) -> None:
    record = {
        "format": 1,
        "total": 1,
        "notation": "__import__('os').getcwd()",
        "parents": {"a": {"digest": "0" * 64}},
    }
    path = put("odd", write_record(record), x=np.float32([1.0]))
    assert verify(path).status == "missing"


def test_non_finite_values_that_were_let_through_are_verified(put: Put, tmp_path: Path) -> None:
    a, b = (load(put(f"in/{n}", x=np.float32([1.0, v]))) for n, v in (("a", np.inf), ("b", 2.0)))
    path = written(mean([a, b]), tmp_path, allow_nonfinite=True)
    assert verify(path, [tmp_path / "in"]).status == "verified"
