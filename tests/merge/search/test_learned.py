"""The learned soup: its gradients, its shares, and the soup that they make."""

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import TINY
from torch.nn import functional as F

from clipmerge.data.split import Split
from clipmerge.errors import SelectionError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.model import build_model, eval_transform, get_tokenizer, resolve_model
from clipmerge.search import mixture as mixture_module
from clipmerge.search.coefficients import groups_of
from clipmerge.search.learned import learned_soup, round_shares
from clipmerge.search.mixture import Candidates, Mixture
from clipmerge.search.results import shares_table
from clipmerge.weights.weights import Weights, from_state_dict, load, load_all

PROMPT = "a photo of a {}."


@pytest.fixture
def two(spread: Sequence[Path]) -> list[Weights]:
    return load_all([spread[0], spread[3]])


@pytest.fixture
def evaluator(tiny_spec: Any, val: Split) -> Evaluator:
    return Evaluator({"val": val}, tiny_spec, templates=PROMPT)


def plain_loss(states: Sequence[Any], shares: torch.Tensor, beta: torch.Tensor, spec: Any, val: Split) -> Any:
    """Cross-entropy of the mixed model, by open_clip alone; differentiable in shares and beta."""
    mixed = {n: sum(s * state[n] for s, state in zip(shares, states, strict=True)) for n in states[0]}
    model = build_model(spec, seed=0)

    def call(method: str, *args: Any) -> torch.Tensor:
        class Wrap(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *inputs: Any) -> Any:
                return getattr(self.model, method)(*inputs, normalize=True)

        named = {f"model.{n}": t for n, t in mixed.items()}
        return torch.func.functional_call(Wrap(), named, args)  # type: ignore[no-any-return]

    tokens = get_tokenizer(spec)([PROMPT.format(name) for name in val.classes])
    images = torch.stack([eval_transform(spec)(val.image(i)) for i in range(20)])
    logits = mixed["logit_scale"].exp() * call("encode_image", images) @ call("encode_text", tokens).T
    return F.cross_entropy(beta * logits, torch.from_numpy(val.labels[:20]))


def test_gradients_are_those_of_the_mixed_model(
    two: list[Weights], evaluator: Evaluator, tiny_spec: Any, val: Split
) -> None:
    evaluator.load(two[0])
    made = Mixture(evaluator, "val", two, groups_of(two[0].names, "model"))
    shares = torch.tensor([[0.3, 0.7]])
    by_share, by_beta, loss = made.gradients(shares, 0.8, torch.arange(20))
    free, beta = shares[0].clone().requires_grad_(), torch.tensor(0.8, requires_grad=True)
    expected = plain_loss([w.state_dict() for w in two], free, beta, tiny_spec, val)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(by_share[0], free.grad, rtol=1e-3, atol=1e-5)
    assert beta.grad is not None
    assert by_beta == pytest.approx(beta.grad.item(), rel=1e-4)


def test_gradients_reach_the_statistics_of_batch_norm(tmp_path: Path, val: Split) -> None:
    """Against differences of the mixed ResNet's loss, whose BatchNorm torch itself computes."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
    (tmp_path / "resnet.json").write_text(json.dumps({"model_cfg": {**TINY, "vision_cfg": vision}}))
    spec = resolve_model(tmp_path / "resnet.json")
    models = []
    for seed in (0, 1):
        state = dict(build_model(spec, seed=seed).state_dict())
        noise = torch.Generator().manual_seed(seed)
        state |= {n: torch.rand(t.shape, generator=noise) + 0.5 for n, t in state.items() if "running" in n}
        models.append(from_state_dict(state, f"m{seed}"))
    judge = Evaluator(val, model=spec)
    judge.load(models[0])
    made = Mixture(judge, "val", models, groups_of(models[0].names, "model"))
    labels = torch.from_numpy(val.labels)

    def loss_at(share: float) -> float:
        mixed = models[0] * (1 - share) + models[1] * share
        return float(F.cross_entropy(judge.logits(mixed, "val").double(), labels))

    by_share, _, loss = made.gradients(torch.tensor([[0.6, 0.4]]), 1.0, torch.arange(len(val)))
    assert loss == pytest.approx(loss_at(0.4), rel=1e-4)
    slope = (loss_at(0.41) - loss_at(0.39)) / 0.02
    assert float(by_share[0, 1] - by_share[0, 0]) == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("per", ["model", "tower", "block", "tensor"])
def test_shares_lower_the_held_out_loss_and_sum_to_one(
    per: Any, two: list[Weights], evaluator: Evaluator, tiny_spec: Any, val: Split
) -> None:
    soup = learned_soup(two, evaluator, per=per, epochs=3, batch_size=64)
    assert soup.kind == "learned_soup"
    assert soup.weights.total == 1
    rows = soup.coefficients or {}
    for row in rows.values() if per != "model" else [rows]:
        assert sum(Fraction(repr(share)) for share in row.values()) == 1
    logits = [evaluator.logits(w, "val") for w in (soup.weights, two[0] * 0.5 + two[1] * 0.5)]
    labels = torch.from_numpy(val.labels)
    learned, equal = (
        F.cross_entropy((soup.temperature or 1) * logits[0], labels),
        F.cross_entropy(logits[1], labels),
    )
    assert learned < equal
    assert soup.score.correct == evaluator.score(soup.weights).correct
    assert len(soup.table().rows) == (2 if per == "tensor" else len(rows))
    assert soup.to_json()["kind"] == "learned_soup"


def test_a_better_checkpoint_gets_the_larger_share(evaluator: Evaluator, tiny_spec: Any) -> None:
    """Against weights whose logits are confidently wrong, nearly all goes to the sane ones."""
    good = {k: v.clone() for k, v in build_model(tiny_spec, seed=3).state_dict().items()}
    bad = {k: v.clone() for k, v in good.items()}
    bad["logit_scale"] = bad["logit_scale"] + 6
    models = [from_state_dict(bad, "bad"), from_state_dict(good, "good")]
    soup = learned_soup(models, evaluator, epochs=8, batch_size=50, temperature=False)
    assert soup.coefficients is not None
    assert soup.coefficients["good"] > 0.7
    assert soup.temperature == 1.0


def test_one_checkpoint_is_its_own_soup(spread: Sequence[Path], evaluator: Evaluator) -> None:
    soup = learned_soup([spread[0]], evaluator, epochs=1)
    assert soup.coefficients == {"m0": 1.0}
    state = load(spread[0]).state_dict()
    assert all(torch.equal(t, state[n]) for n, t in soup.weights.state_dict().items())


def test_shares_are_rounded_to_rows_that_sum_to_exactly_one() -> None:
    rows = round_shares(torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25]]))
    assert [sum(row) for row in rows] == [1, 1]
    assert rows[0] == [Fraction(333334, 10**6), Fraction(333333, 10**6), Fraction(333333, 10**6)]


def test_what_cannot_be_learned_is_refused(
    two: list[Weights], evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SelectionError, match="no grouping 'layer'"):
        learned_soup(two, evaluator, per="layer")  # type: ignore[arg-type]
    monkeypatch.setattr(mixture_module, "MOST_PROMPTS", 5)
    with pytest.raises(SelectionError, match="at most 5 prompts, not 10"):
        learned_soup(two, evaluator)


def test_images_that_cover_some_of_the_classes_are_learned_from(
    two: list[Weights], tiny_spec: Any, val: Split
) -> None:
    """Classes that the data lacks are out of the loss, and no NaN comes back from them."""
    some = replace(
        val.subset([i for i in range(len(val)) if val.labels[i] in (2, 5, 7)]),
        class_subset=np.array([2, 5, 7]),
    )
    judge = Evaluator({"val": some}, tiny_spec, templates=PROMPT)
    judge.load(two[0])
    mixture = Mixture(judge, "val", two, groups_of(two[0].names, "model"))
    shares = torch.tensor([[1.0, 0.0]])
    by_share, by_beta, loss = mixture.gradients(shares, 1.3, torch.arange(len(some)))
    logits = judge.logits(two[0], "val")[:, [2, 5, 7]]
    labels = torch.tensor([[2, 5, 7].index(label) for label in some.labels])
    beta = torch.tensor(1.3, requires_grad=True)
    wanted = F.cross_entropy(beta * logits, labels)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert by_beta == pytest.approx(beta.grad.item(), rel=1e-4, abs=1e-6)
    assert bool(torch.isfinite(by_share).all())


def test_shares_are_shown_whole_where_they_fit_and_as_a_range_where_not() -> None:
    assert shares_table({"a": 0.25, "b": 0.75}, 1.23456).title == "learned soup; logits times 1.235"
    assert shares_table({"a": 0.25, "b": 0.75}, None).rows == (("a", "0.2500"), ("b", "0.7500"))
    few = shares_table({"visual": {"a": 0.25, "b": 0.75}, "text": {"a": 1.0, "b": 0.0}}, None)
    assert (few.headers, few.rows[0]) == (("group", "a", "b"), ("visual", "0.2500", "0.7500"))
    many = shares_table({f"t{i}": {"a": i / 100, "b": 1 - i / 100} for i in range(101)}, None)
    assert many.headers == ("checkpoint", "mean share", "lowest", "highest")
    assert many.rows == (("a", "0.5000", "0.0000", "1.0000"), ("b", "0.5000", "0.0000", "1.0000"))
    assert many.title == "learned soup; 101 groups"


@pytest.mark.parametrize("per", ["model", "tower", "block", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_in_one_matrix_are_those_read_from_files(
    per: Any, dtype: torch.dtype, two: list[Weights], evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture_module, "_COLUMNS", 1000)
    states = [{n: t.to(dtype) for n, t in w.state_dict().items()} for w in two]
    models = [from_state_dict(state, f"m{i}") for i, state in enumerate(states)]
    evaluator.load(models[0])
    known, groups = evaluator.predictor.resident.module.state_dict(), groups_of(models[0].names, per)
    streamed, kept = (Candidates(models, groups, known, torch.device("cpu")) for _ in range(2))
    kept.keep(if_it_fits=False)
    assert kept._matrix is not None
    assert kept._matrix.dtype == dtype
    draw = torch.Generator().manual_seed(0)
    shares = torch.rand(len(groups), 2, generator=draw).softmax(1)
    for candidates in (streamed, kept):
        candidates.mix(shares)
    for name, tensor in kept.mixed.items():
        torch.testing.assert_close(tensor, streamed.mixed[name], rtol=1e-6, atol=1e-7)
    gradients = {n: torch.randn(t.shape, generator=draw) for n, t in kept.mixed.items() if "bias" in n}
    torch.testing.assert_close(kept.products(gradients), streamed.products(gradients), rtol=1e-4, atol=1e-5)
