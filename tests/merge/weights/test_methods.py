"""The table of nonlinear methods, and what it refuses."""

import gc
import inspect
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipmerge as cm
from clipmerge.errors import CheckpointError, DeviceError, NonFiniteError, RecipeError
from clipmerge.ops import vectors
from clipmerge.ops.spaces import merge_in
from clipmerge.weights import blocks, measure, run
from clipmerge.weights import weights as face
from clipmerge.weights.digest import content_digest
from clipmerge.weights.methods import METHODS, apply
from clipmerge.weights.names import is_transposed
from clipmerge.weights.record import write_record
from clipmerge.weights.weights import Weights

Point = Callable[..., Weights]


def test_the_table_says_what_the_functions_take() -> None:
    for name, method in METHODS.items():
        parameters = inspect.signature(method.function).parameters.values()
        options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert name == method.name
        assert set(method.options) <= options
        assert re.search(r"Source: .*\d{4}", method.function.__doc__ or "") or name == "equalise"


def test_points_give_a_point_and_vectors_a_vector(point: Point) -> None:
    a, b = point("a"), point("b")
    assert apply("slerp", [a, b]).kind() == 1
    assert apply("magmax", [a - b, b - a]).kind() == 0
    assert (a + 0.5 * apply("magmax", [a - b, b - a])).kind() == 1


@pytest.mark.parametrize(
    ("name", "count", "options", "message", "hint"),
    [
        ("slrp", 2, {}, "there is no method 'slrp'", "did you mean slerp?"),
        ("qqq", 2, {}, "there is no method 'qqq'", "known: "),
        ("slerp", 3, {}, "slerp takes 2 operands, not 3", None),
        ("model_stock", 2, {}, "model_stock takes at least 3 operands, not 2", None),
        ("slerp", 2, {"alpa": 1.0}, "slerp has no option 'alpa'", "did you mean alpha?"),
        ("magmax", 2, {}, "magmax takes task vectors (total 0), such as a - base, not m0", None),
    ],
)
def test_what_is_refused(
    point: Point, name: str, count: int, options: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as refused:
        apply(name, [point(f"m{i}") for i in range(count)], **options)
    assert refused.value.message == message
    assert (refused.value.hint or "").startswith(hint or "")


def test_a_path_stands_for_the_checkpoint_there(
    point: Point, arrays: Callable[..., Any], tmp_path: Path
) -> None:
    a, b = (point(name, x=np.array([[1.0, 2.0], [3.0, i]], np.float32)) for i, name in enumerate("ab"))
    for weights, name in ((a, "a"), (b, "b"), (b - a, "v")):
        weights.save(tmp_path / f"{name}.safetensors")
    one, two = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    right = arrays(cm.slerp(a, b, 0.25))["x"]
    for merged in (
        cm.slerp(one, two, 0.25),
        cm.slerp(Path(one), Path(two), alpha=0.25),
        cm.slerp([one, b], 0.25),
    ):
        np.testing.assert_array_equal(arrays(merged)["x"], right)
    assert cm.ties([tmp_path / "v.safetensors", b - a], density=0.5).kind() == 0
    with pytest.raises(CheckpointError, match="does not exist"):
        cm.slerp(str(tmp_path / "gone.safetensors"), b, 0.25)


def test_vectors_are_no_points(point: Point) -> None:
    with pytest.raises(RecipeError, match=r"slerp takes models \(total 1\), not a - b"):
        apply("slerp", [point("a") - point("b"), point("c")])


SHAPES: dict[str, tuple[int, ...]] = {
    "visual.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    "visual.transformer.resblocks.1.mlp.c_fc.weight": (24, 24),
    "visual.conv1.weight": (4, 3, 2, 2),
    "text_projection": (8, 6),
    "ln_final.weight": (8,),
    "logit_scale": (),
    "none": (0, 2),
}
Model = dict[str, np.ndarray]


def models(count: int, seed: int = 0) -> list[Model]:
    """Random float32 tensors of `SHAPES`, the base first."""
    rng = np.random.default_rng(seed)
    return [{k: rng.standard_normal(s).astype("f4") for k, s in SHAPES.items()} for _ in range(count)]


def merged(name: str, made: list[Model], point: Point, arrays: Callable[..., Any], **options: Any) -> Model:
    """The method over the models: of task vectors, the base plus its result."""
    base, *others = [point(f"m{i}", **tensors) for i, tensors in enumerate(made)]
    method = METHODS[name]
    operands = [base, *others] if method.takes == "points" else [other - base for other in others]
    if method.statistics:
        options["statistics"] = [statistics(name, point, o, made[i]) for i, o in enumerate(operands)]
    result = apply(name, operands[: method.operands[1]], **options)
    return arrays(result if method.gives else base + result, "F64")


def statistics(name: str, point: Point, of: Any, tensors: Model) -> Any:
    """Numbers that statistics could have, by what they are of."""
    tensors = {key: value.astype("f8") for key, value in tensors.items()}
    if name == "fisher":
        held = {k: v**2 + 0.1 for k, v in tensors.items()}
    else:
        matrices = {k: v for k, v in tensors.items() if v.ndim == 2}
        turned = {k: v.T if is_transposed(k) else v for k, v in matrices.items()}
        held = {k: v.T @ v + np.eye(v.shape[1]) for k, v in turned.items()}
    file = point("of", **{k: np.asarray(v, "f4") for k, v in held.items()}).checkpoints[0]
    about = {"method": name, "of": content_digest(of.checkpoints[0])}
    return Weights.of(replace(file, metadata=write_record({"statistics": about})))


def farthest(one: Model, other: Model) -> float:
    return max(np.abs(one[key] - other[key]).max(initial=0) for key in one)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_tensors_of_any_rank(name: str, point: Point, arrays: Callable[..., Any]) -> None:
    """Every CLIP has a scalar, `logit_scale`."""
    made = models(4)
    got = merged(name, made, point, arrays)
    assert {key: value.shape for key, value in got.items()} == SHAPES
    assert all(np.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_models_that_are_the_base_give_the_base(name: str, point: Point, arrays: Callable[..., Any]) -> None:
    """Zero vectors, and equal points: nothing to merge, and no NaN."""
    (made,) = models(1)
    assert farthest(merged(name, [made] * 4, point, arrays), made) < 1e-6


def _far_apart(count: int) -> list[Model]:
    """Models in fp16 whose differences fp16 cannot hold: entries of ±40000 that change their sign."""
    made = models(count)
    for number, one in enumerate(made):
        for key, value in one.items():
            value = np.sign(value) * (40000 if number else -40000)
            one[key] = value.astype("f2")
    return made


@pytest.mark.parametrize("name", sorted(METHODS))
def test_task_vectors_beyond_fp16_are_computed_and_what_overflows_is_refused_by_name(
    name: str, point: Point, arrays: Callable[..., Any], tmp_path: Path
) -> None:
    made = _far_apart(4)
    got = merged(name, made, point, arrays)
    assert all(np.isfinite(value).all() for value in got.values())
    if METHODS[name].takes == "points":  # middles of models are no larger than these
        return
    base, *others = [point(f"m{i}", **tensors) for i, tensors in enumerate(made)]
    far = base + 1000 * apply(name, [other - base for other in others])
    with pytest.raises(NonFiniteError, match=r"tensor '\S+' reaches"):
        far.save(tmp_path / "far.safetensors", dtype="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_swallows_what_is_not_finite(
    name: str, wrong: float, point: Point, arrays: Callable[..., Any]
) -> None:
    """Trimming drops entries, and ranking passes over them: the inputs are looked at before."""
    for which in range(1 if name == "slerp" else 3):
        for key in ("visual.transformer.resblocks.1.mlp.c_fc.weight", "ln_final.weight"):
            made = models(4)
            made[which][key].flat[3] = wrong
            with pytest.raises(NonFiniteError, match=f"'{key}' holds 1 value that is not finite"):
                merged(name, made, point, arrays)


def _rank_2(made: list[Model]) -> list[Model]:
    key, rng = "visual.transformer.resblocks.1.mlp.c_fc.weight", np.random.default_rng(1)
    base = made[0][key]
    low = [rng.standard_normal((24, 2)) @ rng.standard_normal((2, 24)) for _ in made[1:]]
    return [made[0], *({**m, key: (base + u).astype("f4")} for m, u in zip(made[1:], low, strict=True))]


def _twice(made: list[Model]) -> list[Model]:
    return [*made, made[1]]


def _frozen(made: list[Model]) -> list[Model]:
    """Two layers that no task, and one that one task, has trained."""
    names = list(SHAPES)[:2]
    everywhere = [{**m, names[0]: made[0][names[0]], "logit_scale": made[0]["logit_scale"]} for m in made]
    everywhere[1][names[1]] = made[0][names[1]]
    return everywhere


@pytest.mark.parametrize("damage", [_rank_2, _twice, _frozen])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_rounding_in_the_input_stays_rounding(
    name: str, damage: Callable[..., list[Model]], point: Point, arrays: Callable[..., Any]
) -> None:
    """Where directions or tasks are not determined, noise of 1e-7 must not choose them."""
    rng = np.random.default_rng(9)
    exact = damage([{k: v.astype("f8") for k, v in m.items()} for m in models(4)])
    noisy = [{k: v.astype("f8") + 1e-7 * rng.standard_normal(v.shape) for k, v in m.items()} for m in exact]
    assert farthest(merged(name, exact, point, arrays), merged(name, noisy, point, arrays)) < 1e-4


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.symmetric))
def test_the_order_changes_no_bit(name: str, point: Point, arrays: Callable[..., Any]) -> None:
    base, *others = models(4)
    forward = merged(name, [base, *others], point, arrays)
    backward = merged(name, [base, *others[::-1]], point, arrays)
    if METHODS[name].takes == "points":
        backward = merged(name, [*others[::-1], base], point, arrays)
    assert farthest(forward, backward) == 0


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.on == "matrices"))
def test_matrices_are_told_from_the_rest(name: str, point: Point, arrays: Callable[..., Any]) -> None:
    """q, k and v apart (or fused), what is no matrix is the mean, or for SVC what it was merged to."""
    made = models(4)
    method, got, fused = (
        METHODS[name],
        *(merged(name, made, point, arrays, **o) for o in ({}, {"fused": True})),
    )
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    defaults = {k: o.default for k, o in method.options.items()}
    wide = [{k: v.astype("f8") for k, v in m.items()} for m in made]
    base = 0 if method.takes == "points" else wide[0][key]
    operands = [m[key] - base for m in (wide if method.takes == "points" else wide[1:])]
    more = {"merged": None} if method.takes_merged else {}
    parts = [method.function(*(o[i : i + 8] for o in operands), **defaults, **more) for i in (0, 8, 16)]
    np.testing.assert_allclose(got[key], base + np.concatenate(parts), atol=1e-9)
    np.testing.assert_allclose(fused[key], base + method.function(*operands, **defaults, **more), atol=1e-9)
    assert farthest({key: got[key]}, {key: fused[key]}) > 1e-3
    for rest in ("text_projection", "visual.conv1.weight", "ln_final.weight", "logit_scale"):
        tensors = [m[rest] for m in wide]
        mean = np.mean(tensors[1:] if method.takes == "vectors" else tensors, axis=0)
        expected = np.sum(tensors[1:], axis=0) - 2 * tensors[0] if method.takes_merged else mean
        np.testing.assert_allclose(got[rest], expected, atol=1e-12)


ALIGNED = sorted(name for name, method in METHODS.items() if "space" in method.all_options)


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("name", ALIGNED)
def test_every_method_of_task_vectors_works_in_a_space_that_they_share(
    name: str, space: str, point: Point, arrays: Callable[..., Any]
) -> None:
    """Matrices (q, k and v apart) are merged there, other tensors as ever; order changes no bit, zeros give zeros."""
    made = _rank_2(models(4))
    got = merged(name, made, point, arrays, space=space)
    key, method = "visual.transformer.resblocks.0.attn.in_proj_weight", METHODS[name]
    keywords = {k: o.default for k, o in method.options.items()}
    keywords |= {"scope": "tensor"} if "scope" in keywords else {}
    wide = [{k: v.astype("f8") for k, v in m.items()} for m in made]
    taken = [m[key] - wide[0][key] for m in wide[1:]]
    taken = taken if method.on != "entries" else [each.astype("f4") for each in taken]
    for number, rows in enumerate((slice(8), slice(8, 16), slice(16, 24))):
        named = {"name": f"{key}[{number}]"} if "name" in method.keywords else {}
        rule = partial(method.function, **keywords, **named)
        expected = wide[0][key][rows] + merge_in(space, rule, *(each[rows] for each in taken))
        np.testing.assert_allclose(got[key][rows], expected, atol=1e-6)
    whole = merged(name, made, point, arrays, **({"scope": "tensor"} if "scope" in keywords else {}))
    for rest in ("text_projection", "visual.conv1.weight", "ln_final.weight", "logit_scale"):
        np.testing.assert_array_equal(got[rest], whole[rest])
    if method.symmetric:
        backward = merged(name, [made[0], *made[:0:-1]], point, arrays, space=space)
        assert farthest(got, backward) == 0
    assert farthest(merged(name, made[:1] * 4, point, arrays, space=space), made[0]) < 1e-6


DECOMPOSING = [(n, {}) for n, m in sorted(METHODS.items()) if m.on in ("matrices", "layers")]


@pytest.mark.parametrize(
    ("name", "options"),
    [*DECOMPOSING, ("ties", {"space": "core"}), ("dare", {"space": "knots"}), ("tsv", {"space": "core"})],
)
@pytest.mark.parametrize("damage", [list, _rank_2, _twice])
def test_matrices_of_torch_give_the_same(
    name: str,
    options: dict[str, Any],
    damage: Callable[..., list[Model]],
    point: Point,
    arrays: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU is lent are arrays of torch: here they lie on the CPU."""
    import torch

    made = damage(models(4))
    ours = merged(name, made, point, arrays, **options)
    monkeypatch.setattr(run, "decomposing_gpu", lambda *_: torch.device("cpu"))
    assert farthest(ours, merged(name, made, point, arrays, **options)) < 1e-7


def test_a_gpu_is_asked_for_where_there_is_something_to_decompose(point: Point) -> None:
    a, b = point("a"), point("b")
    for expression in (a - b, apply("ties", [a - b]), apply("slerp", [a, b])):
        assert run.decomposing_gpu(expression.terms, "nonsense") is None  # not even looked at
    for expression in (apply("tsv", [a - b]), 2 * apply("ties", [apply("tsv", [a - b])])):
        assert run.decomposing_gpu(expression.terms, "cpu") is None
        with pytest.raises(DeviceError, match="'nonsense' is no device"):
            run.decomposing_gpu(expression.terms, "nonsense")


def test_a_space_is_an_option_like_others(point: Point) -> None:
    a, b = point("a"), point("b")
    expression = apply("ties", [a - b], space="core")
    assert repr(expression) == 'ties([a - b], density=0.2, scope="tensor", space="core")'
    assert repr(apply("tsv", [a - b], space="full")) == "tsv([a - b])"
    with pytest.raises(RecipeError, match="ranks entries of each matrix in a space of its own"):
        apply("ties", [a - b], space="knots", scope="model")
    with pytest.raises(RecipeError, match="is one of full, core, knots, not 'cor'"):
        apply("tsv", [a - b], space="cor")
    for name in ("svc", "lines", "equalise"):  # they work on what was merged, or merge nothing
        with pytest.raises(RecipeError, match="has no option 'space'"):
            apply(name, [a - b], space="core")


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.takes == "vectors"))
def test_one_model_in_float64_makes_all_of_it_float64(
    name: str, point: Point, arrays: Callable[..., Any]
) -> None:
    """Entries are compared as they are: none is rounded to float32 because its neighbour was."""
    made = models(4)
    wide = [{k: np.asarray(v, "f8") for k, v in m.items()} for m in made]
    wide[3] = {k: np.asarray(v + 1e-9) for k, v in wide[3].items()}
    got = merged(name, [*made[:3], wide[3]], point, arrays)
    assert farthest(got, merged(name, wide, point, arrays)) < 1e-9  # operands in another order


def test_thresholds_are_of_the_whole_model(point: Point, arrays: Callable[..., Any], monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)  # several stretches in a tensor
    made = models(4)
    wide = [{k: v.astype("f8") for k, v in m.items()} for m in made]
    flat = [np.concatenate([(m[k] - wide[0][k]).ravel() for k in SHAPES]) for m in wide[1:]]
    for name, straight in {
        "ties": vectors.ties(*flat, density=0.3),
        "breadcrumbs": vectors.breadcrumbs(*flat, beta=0.05, gamma=0.5),
    }.items():
        options = {"ties": {"density": 0.3}, "breadcrumbs": {"beta": 0.05, "gamma": 0.5}}[name]
        got = merged(name, made, point, arrays, scope="model", **options)
        base = np.concatenate([wide[0][k].ravel() for k in SHAPES])
        np.testing.assert_allclose(
            np.concatenate([got[k].ravel() for k in SHAPES]), base + straight, atol=1e-6
        )
        per_tensor = merged(name, made, point, arrays, scope="tensor", **options)
        for key in SHAPES:
            own = getattr(vectors, name)(*(m[key] - wide[0][key] for m in wide[1:]), **options)
            np.testing.assert_allclose(per_tensor[key], wide[0][key] + own, atol=1e-6)


def test_cancelled_entries_take_the_sign_of_most_of_the_model(
    point: Point, arrays: Callable[..., Any]
) -> None:
    tensors = {"x": [1.0], "y": [-1.0, -1.0]}
    base = point("base", x=[0.0], y=[0.0, 0.0])
    a, b = point("a", **tensors), point("b", x=[-1.0], y=[-1.0, -1.0])
    assert arrays(base + apply("ties", [a - base, b - base], density=1.0))["x"] == [-1.0]


def test_lines_by_the_models_blocks_and_norms(point: Point, arrays: Callable[..., Any]) -> None:
    names = [f"{tower}resblocks.{i}.w" for tower in ("visual.", "transformer.") for i in range(3)]
    base = point("base", logit_scale=[0.0], **{name: [0.0] for name in names})
    a, b = (point(n, logit_scale=[2.0], **{name: [2.0] for name in names}) for n in "ab")
    merge = arrays(base + apply("lines", [a - base, b - base], beta=1.0))
    assert [float(merge[name][0]) for name in names] == [2.0, 4.0, 6.0] * 2  # (1/2 + l/2)·4
    assert merge["logit_scale"] == [2.0]
    twice = 2 * apply("magmax", [a - base, b - base])  # ‖Στ‖₁ over it is 1: α is 1/2 again, and β the rest
    merge = arrays(base + apply("lines", [a - base, b - base], merged=twice))
    assert [float(merge[name][0]) for name in names] == [2.0, 3.0, 4.0] * 2


def test_operands_can_be_equalised_over_the_whole_model(point: Point, arrays: Callable[..., Any]) -> None:
    base = point("base", x=[0.0, 0.0], y=[0.0])
    a, b, c = (
        point("a", x=[3.0, 0.0], y=[4.0]),
        point("b", x=[0.0, 1.0], y=[0.0]),
        point("c", x=[0.0, 0.0], y=[2.0]),
    )
    vectors = [p - base for p in (a, b, c)]  # norms 5, 1, 2
    np.testing.assert_allclose(arrays(base + apply("equalise", vectors))["x"], [1.2, 2.0])
    np.testing.assert_allclose(arrays(base + apply("magmax", vectors, equalise=True))["y"], [2.0])


def test_copies_count_once_where_directions_would_be_invented(
    point: Point, arrays: Callable[..., Any]
) -> None:
    made = models(4)
    for name in (n for n, m in METHODS.items() if m.distinct):
        once, twice = merged(name, made, point, arrays), merged(name, [*made, made[2]], point, arrays)
        assert farthest(once, twice) < 1e-12


def test_options_are_checked(point: Point) -> None:
    a, b = point("a"), point("b")
    for options, message in {
        "density=2.0": "the option 'density' of ties is between 0 and 1, not 2",
        "scope='whole'": "the option 'scope' of ties is one of model, tensor, not 'whole'",
        "density='x'": "the option 'density' of ties takes a number, not 'x'",
        "density=[0.1, 0.2]": "the option 'density' of ties takes one number",
        "equalise=1": "the option 'equalise' of ties is True or False, not 1",
    }.items():
        with pytest.raises(RecipeError) as refused:
            apply("ties", [a - b], **eval(f"dict({options})"))
        assert refused.value.message == message
    with pytest.raises(RecipeError, match="one for each operand: 1"):
        apply("consensus", [a - b], threshold=[0.1, 0.2])
    with pytest.raises(RecipeError, match="ties has no operand 'merged'"):
        apply("ties", [a - b], merged=a - b)


def test_each_method_is_a_function(point: Point) -> None:
    """Operands one by one or in a list, options by place or by name; the documentation is the rule's own."""
    a, b, base = (point(n) for n in ("a", "b", "base"))
    texts = {
        repr(made)
        for made in (face.slerp(a, b, 0.3), face.slerp([a, b], alpha=0.3), apply("slerp", [a, b], alpha=0.3))
    }
    assert texts == {"slerp([a, b], alpha=0.3)"}
    assert repr(face.model_stock([base, a, b])) == "model_stock([base, a, b])"
    assert isinstance(face.magmax([a - base, b - base]), Weights)
    assert {getattr(face, name).__doc__ for name in METHODS} == {m.function.__doc__ for m in METHODS.values()}
    with pytest.raises(RecipeError, match="slerp takes 1 options, not 2"):
        face.slerp(a, b, 0.3, 0.4)
    with pytest.raises(AttributeError):
        _ = face.slurp


@pytest.mark.parametrize("name", sorted(METHODS))
def test_memory_is_that_of_one_tensor_of_each_ingredient(
    name: str, put: Any, point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times as many layers take no more memory, and a layer takes a few copies of its matrices in float64."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 14)
    method, edge, models = METHODS[name], 128, 5
    rng = np.random.default_rng(0)

    def peak(layers: int) -> int:
        paths = []
        for number in range(models):
            matrices = {f"visual.l{i:02}.weight": rng.standard_normal((edge, edge)) for i in range(layers)}
            path = tmp_path / f"{layers}-{number}.safetensors"
            paths.append(put(path.name, **{key: matrix.astype("f4") for key, matrix in matrices.items()}))
            if method.statistics:
                held = {key: matrix.T @ matrix for key, matrix in matrices.items()}
                held = {key: np.abs(matrix).astype("f4") for key, matrix in held.items()}
                about = {"method": name, "of": content_digest(cm.load(path).checkpoints[0])}
                beside = path.with_suffix(f".{method.statistics}.safetensors")
                point("of", **held).save(beside, metadata={"statistics": about})
        base, *others = cm.load_all(paths)
        operands = [base, *others] if method.takes == "points" else [other - base for other in others]
        result = apply(name, operands[: method.operands[1]])
        gc.collect()
        tracemalloc.start()
        try:
            (result if method.gives else base + result).save(
                tmp_path / f"out{layers}.st", threads=1, digests=False
            )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is imported on the way
    few, many = peak(6), peak(24)
    sample = 24 * edge**2 * models * 4 * measure.SAMPLED // blocks.BLOCK  # of whole-model thresholds
    assert many < 1.1 * few + 2 * sample + 50_000
    assert (
        few < 6 * models * edge**2 * 8 + 2 * blocks.BLOCK * 60
    )  # copies of its matrices, the pass's buffers
