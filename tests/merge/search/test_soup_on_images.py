"""The greedy soup on real images, against the published procedure written out without any of our code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipmerge import greedy_soup, mean
from clipmerge.data.split import Split
from clipmerge.errors import NonFiniteError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.model import build_model, eval_transform, get_tokenizer
from clipmerge.search.ensemble import ensemble_logits, greedy_ensemble, score_ensemble
from clipmerge.search.soup import uniform_soup
from clipmerge.weights.weights import load_all


class StraightLine:
    """Every trial: read all files, average them, load the result, build the head, decode all images."""

    def __init__(self, paths: Sequence[Path], spec: Any, val: Split) -> None:
        self.paths, self.spec, self.val = paths, spec, val

    @torch.no_grad()
    def logits(self, members: Sequence[int]) -> torch.Tensor:
        states = [load_file(self.paths[i]) for i in members]
        summed = {k: sum(s[k].double() for s in states) / len(states) for k in states[0]}
        model = build_model(self.spec, seed=0)
        model.load_state_dict({k: torch.as_tensor(v, dtype=torch.float32) for k, v in summed.items()})
        tokenizer, transform = get_tokenizer(self.spec), eval_transform(self.spec)
        head = []
        for name in self.val.classes:
            prompts = model.encode_text(tokenizer([f"a photo of a {name}."]))
            average = torch.nn.functional.normalize(prompts, dim=-1).mean(0)
            head.append(average / average.norm())
        images = torch.stack([transform(self.val.image(i)) for i in range(len(self.val))])
        features = model.encode_image(images)
        features = features / features.norm(dim=-1, keepdim=True)
        return model.logit_scale.exp() * features @ torch.stack(head).T

    def count(self, members: Sequence[int]) -> int:
        return int((self.logits(members).argmax(1).numpy() == self.val.labels).sum())

    def greedy(self, strict: bool) -> tuple[list[int], list[int], list[int]]:
        alone = [self.count([i]) for i in range(len(self.paths))]
        order = sorted(range(len(self.paths)), key=lambda i: (-alone[i], i))
        chosen, best = order[:1], alone[order[0]]
        for i in order[1:]:
            new = self.count([*chosen, i])
            if new > best or (new == best and not strict):
                chosen, best = [*chosen, i], new
        return order, chosen, [*alone, best]


@pytest.fixture(scope="module")
def written_out(spread: Sequence[Path], tiny_spec: Any, val: Split) -> StraightLine:
    return StraightLine(spread, tiny_spec, val)


@pytest.mark.parametrize("strict", [False, True])
def test_greedy_picks_what_the_published_procedure_picks(
    written_out: StraightLine, tiny_spec: Any, val: Split, spread: Sequence[Path], strict: bool
) -> None:
    order, chosen, counts = written_out.greedy(strict)
    evaluator = Evaluator({"val": val}, tiny_spec, templates="a photo of a {}.")
    soup = greedy_soup(list(spread), evaluator, strict=strict)
    assert [step.name for step in soup.history] == [f"m{i}" for i in order]
    assert list(soup.ingredients) == [f"m{i}" for i in chosen]
    assert soup.score.correct == counts[-1]
    assert [round(step.alone * 150) for step in soup.history] == [counts[i] for i in order]
    assert len(set(counts)) > 2  # the checkpoints do differ
    exact = soup.weights.state_dict()
    states = [load_file(spread[i]) for i in chosen]
    for name, tensor in exact.items():
        expected = sum(s[name].double() for s in states) / len(states)
        assert torch.equal(tensor, torch.as_tensor(expected, dtype=torch.float32))


def test_early_stopping_and_a_journal_change_nothing(
    spread: Sequence[Path], tiny_spec: Any, val: Split, tmp_path: Path
) -> None:
    soups = []
    for early_stop, journal in ((True, None), (False, None), (True, tmp_path / "j"), (True, tmp_path / "j")):
        evaluator = Evaluator({"val": val}, tiny_spec, journal=journal)
        soups.append(greedy_soup(list(spread), evaluator, early_stop=early_stop))
    assert len({(soup.ingredients, soup.score.correct) for soup in soups}) == 1
    assert evaluator.images_scored == 0
    assert soups[0].images is not None
    assert soups[1].images is not None
    assert soups[0].images["scored"] <= soups[1].images["scored"] == 11 * 150


def test_a_metric_other_than_top_1_decides(spread: Sequence[Path], tiny_spec: Any, val: Split) -> None:
    for metric in ("macro_f1", "ece"):
        evaluator = Evaluator({"val": val}, tiny_spec, metric=metric)
        soup = greedy_soup(list(spread), evaluator)
        figures = [step.alone for step in soup.history]
        assert figures == sorted(figures, reverse=metric == "macro_f1")
        assert soup.history[-1].best == soup.score.value == soup.score.metrics[metric]


def test_memory_of_a_search_does_not_grow_with_checkpoints(
    spread: Sequence[Path], evaluator: Evaluator
) -> None:
    """Nothing but mapped files, one model and one mean: torch's own tensors stay as many as they were."""
    import gc

    def floats() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if issubclass(type(t), torch.Tensor))

    greedy_soup(list(spread[:2]), evaluator)
    few = floats()
    greedy_soup(list(spread), evaluator)
    assert floats() <= few


def test_the_ensemble_is_greedy_over_mean_logits(
    written_out: StraightLine, tiny_spec: Any, val: Split, spread: Sequence[Path]
) -> None:
    evaluator = Evaluator({"val": val}, tiny_spec, templates="a photo of a {}.")
    found = greedy_ensemble(list(spread), evaluator)
    logits = [written_out.logits([i]).double() for i in range(len(spread))]

    def count(members: Sequence[int]) -> int:
        together = torch.stack([logits[i] for i in members]).mean(0)
        return int((together.argmax(1).numpy() == val.labels).sum())

    alone = [count([i]) for i in range(len(spread))]
    order = sorted(range(len(spread)), key=lambda i: (-alone[i], i))
    chosen = order[:1]
    for i in order[1:]:
        if count([*chosen, i]) >= count(chosen):
            chosen.append(i)
    assert list(found.ingredients) == [f"m{i}" for i in chosen]
    assert found.score.correct == count(chosen)
    together = torch.stack([logits[i] for i in chosen]).mean(0).numpy()
    assert np.allclose(ensemble_logits(found.members, evaluator), together, atol=1e-4)
    assert score_ensemble(found.members, evaluator, "val").correct == found.score.correct


def test_a_uniform_soup_is_scored_where_it_can_be(spread: Sequence[Path], evaluator: Evaluator) -> None:
    assert uniform_soup(list(spread)).score is None
    soup = uniform_soup(list(spread), evaluator)
    assert soup.score.correct == evaluator.score(mean(load_all(list(spread)))).correct


def test_a_candidate_that_is_not_finite_is_named(
    spread: Sequence[Path], evaluator: Evaluator, tmp_path: Path
) -> None:
    state = load_file(spread[0])
    state["visual.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "broken.safetensors")
    for order in ("score", "given"):
        with pytest.raises(NonFiniteError, match="broken"):
            greedy_soup([spread[1], tmp_path / "broken.safetensors"], evaluator, order=order)
