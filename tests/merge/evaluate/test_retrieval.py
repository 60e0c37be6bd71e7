"""Recall@k of captions for images and images for captions: by hand, by the published formula, through the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.merge.data.conftest import encoded, shard
from torch.nn import functional as F

from clipmerge.data.open import open_split
from clipmerge.errors import DataError, SelectionError
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.metrics import METRICS, all_metrics, metric_interval
from clipmerge.evaluate.retrieval import Ranks, rank_pairs
from clipmerge.evaluate.score import Score, score_of
from clipmerge.search.ensemble import greedy_ensemble
from clipmerge.search.learned import learned_soup
from clipmerge.search.soup import greedy_soup

KS = (1, 5, 10)


def ranks_of(images: Any, texts: Any, text_of: list[int], image_of: list[int]) -> Ranks:
    image_features, text_features = (torch.tensor(x, dtype=torch.float64) for x in (images, texts))
    return rank_pairs(image_features, text_features, torch.tensor(text_of), torch.tensor(image_of))


def test_ranks_by_hand() -> None:
    """Texts lie at 0°, 30° and 100°, images at 10° and 80°; the first image has the first and the third text."""
    images, texts = (
        [[np.cos(a), np.sin(a)] for a in np.radians(angles)] for angles in ((10, 80), (0, 30, 100))
    )
    ranks = ranks_of(images, texts, [0, 2, 1], [0, 0, 1])
    assert ranks.texts.tolist() == [0, 1], "80° is nearer to 100°, which is not its own, than to 30°"
    assert ranks.images.tolist() == [0, 1, 1]
    metrics = all_metrics(ranks)
    assert metrics["text_recall@1"] == 1 / 2
    assert metrics["image_recall@1"] == 1 / 3
    assert metrics["recall@1"] == pytest.approx(5 / 12)
    assert metrics["recall@5"] == metrics["text_recall@10"] == 1
    score = score_of(ranks, "recall@1")
    assert (score.n, score.correct, score.images_scored) == (5, 2, 2)
    assert repr(score).endswith("5 queries)")


def published(
    images: torch.Tensor, captions: torch.Tensor, image_of: torch.Tensor, k: int
) -> tuple[float, float]:
    """Sort each query's answers, and look for a right one among the first k: (text recall, image recall)."""
    near = captions @ images.T
    right = image_of[:, None] == torch.arange(len(images))
    text = right.T.gather(1, near.T.argsort(dim=1, descending=True)[:, :k]).any(1)
    image = right.gather(1, near.argsort(dim=1, descending=True)[:, :k]).any(1)
    return float(text.double().mean()), float(image.double().mean())


@pytest.mark.parametrize("cells", [7, 2**24])
def test_agrees_with_the_published_formula(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipmerge.evaluate.retrieval._CELLS", cells)  # also in many small pieces
    draw = torch.Generator().manual_seed(0)
    image_of = torch.cat([torch.arange(40), torch.randint(0, 40, (60,), generator=draw)])
    images = F.normalize(torch.randn(40, 8, generator=draw, dtype=torch.float64), dim=1)
    captions = F.normalize(images[image_of] + torch.randn(100, 8, generator=draw, dtype=torch.float64), dim=1)
    metrics = all_metrics(rank_pairs(images, captions, torch.arange(100), image_of))
    for k in KS:
        text, image = published(images, captions, image_of, k)
        assert 0 < text < 1
        assert (metrics[f"text_recall@{k}"], metrics[f"image_recall@{k}"]) == (text, image)
        assert metrics[f"recall@{k}"] == (text + image) / 2


def test_a_tie_counts_against() -> None:
    one = [[1.0, 0.0]] * 4
    collapsed = all_metrics(ranks_of(one, one, [0, 1, 2, 3], [0, 1, 2, 3]))
    assert collapsed["recall@1"] == 0, "a model that maps all to one point knows nothing"
    assert collapsed["recall@5"] == 1


def test_a_caption_of_two_images_is_right_for_both_and_asks_for_each() -> None:
    ranks = ranks_of([[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [0.0, 1.0]], [0, 0, 1], [0, 1, 1])
    assert ranks.texts.tolist() == [0, 0]
    assert ranks.images.tolist() == [0, 1, 0]


def test_wrong_captions_count_as_often_as_they_are_there() -> None:
    """Two other images have the text that stands before the first one's own."""
    ranks = ranks_of([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[0.6, 0.8], [1.0, 0.0]], [0, 1, 1], [0, 1, 2])
    assert ranks.texts.tolist() == [2, 1, 1]


def test_the_interval_is_over_images() -> None:
    draw = np.random.default_rng(0)
    right = draw.random(100) < 0.5
    image_of = np.repeat(np.arange(100), 5)
    ranks = Ranks(np.where(right, 0, 9), np.where(right, 0, 9)[image_of], image_of)
    low, high = metric_interval("image_recall@1", ranks)
    assert low < right.mean() < high
    assert high - low > 0.15, "five captions of one image are not five images"


# --- through the model


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with two captions each, one of which several images share, as a table, shards and Parquet."""
    root, digits = tmp_path_factory.mktemp("captioned"), open_split("digits#val", limit=30)
    rows, members = ["image,caption"], list[tuple[str, bytes]]()
    for i in range(len(digits)):
        data = encoded(digits.image(i), "PNG")
        texts = [f'a photo of the number: "{digits.labels[i]}".', f"number {digits.labels[i]}, drawn by {i}"]
        (root / f"{i:02d}.png").write_bytes(data)
        rows += [f'{i:02d}.png,"{text.replace(chr(34), chr(34) * 2)}"' for text in texts]
        members += [(f"s{i:02d}.png", data), (f"s{i:02d}.txt", "\n".join(texts).encode())]
    (root / "t.csv").write_text("\n".join(rows))
    shard(root / "wds" / "test" / "0.tar", members[: len(members) // 2])
    shard(root / "wds" / "test" / "1.tar", members[len(members) // 2 :])
    (root / "wds" / "dataset_type.txt").write_text("retrieval")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": data, "path": None} for name, data in members if name.endswith("png")]
    captions = [text.decode().split("\n") for name, text in members if name.endswith("txt")]
    pq.write_table(pa.table({"image": images, "caption": captions}), root / "lists.parquet")
    pq.write_table(
        pa.table(
            {"image": images, "caption_0": [c[0] for c in captions], "caption_1": [c[1] for c in captions]}
        ),
        root / "columns.parquet",
    )
    return root


SOURCES = ("t.csv", "wds", "lists.parquet", "columns.parquet")


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_captions_is_scored_alike(
    source: str, captioned: Path, tiny_spec: Any, weights: Any
) -> None:
    split = open_split(captioned / source)
    assert (len(split), split.pictures, split.classes) == (60, 30, ())
    assert split.duplicates == (), "a second caption is no second image"
    evaluator = Evaluator(split, tiny_spec)
    score = evaluator.score(weights["base"])
    assert (score.metric, score.n, evaluator.images_scored) == ("recall@1", 90, 30)
    expected = all_metrics(plain_ranks(evaluator, split))
    assert score.metrics == expected
    assert 0 < score.metrics["text_recall@1"] < 1


def plain_ranks(evaluator: Evaluator, split: Any) -> Ranks:
    """Each image and each caption through the model on its own, and its rank by comparing all pairs."""
    model: Any = evaluator.predictor.resident.module
    from clipmerge.model import eval_transform, get_tokenizer

    transform, tokenizer = eval_transform(evaluator.model), get_tokenizer(evaluator.model)
    _, first, image_of = np.unique(split.index, return_index=True, return_inverse=True)
    with torch.inference_mode():
        images = torch.cat(
            [model.encode_image(transform(split.image(i))[None], normalize=True) for i in first]
        )
        texts = torch.cat([model.encode_text(tokenizer([text]), normalize=True) for text in split.captions])
    near, captions = (texts.double() @ images.double().T).numpy(), np.array(split.captions)
    by_caption = [int((row >= row[own] - 1e-9).sum()) - 1 for row, own in zip(near, image_of, strict=True)]
    by_image = []
    for i, column in enumerate(near.T):
        own = np.isin(captions, captions[image_of == i])
        by_image.append(int((column[~own] >= column[image_of == i].max() - 1e-9).sum()))
    return Ranks(np.array(by_image), np.array(by_caption), image_of)


def test_a_soup_chosen_by_recall_is_the_same_however_it_is_computed(
    captioned: Path, tiny_spec: Any, weights: Any, tmp_path: Path
) -> None:
    split, candidates = open_split(captioned / "t.csv"), [weights[f"ft{i}"] for i in range(4)]
    for metric in ("recall@1", "text_recall@5", "image_recall@10"):
        evaluator = Evaluator(split, tiny_spec, metric=metric, journal=tmp_path / f"{metric}.jsonl")
        result = greedy_soup(candidates, evaluator)
        assert result.score is not None
        assert result.score.value == max(step.best for step in result.history)
        assert all(isinstance(step.outcome, Score) for step in result.history), "each trial is a full pass"
        again = Evaluator(split, tiny_spec, metric=metric, journal=tmp_path / f"{metric}.jsonl")
        resumed = greedy_soup(candidates, again)
        assert resumed.ingredients == result.ingredients
        assert (again.images_scored, again.images_saved) == (0, evaluator.images_scored)


def test_labels_and_captions_together_are_scored_by_either(
    captioned: Path, tiny_spec: Any, weights: Any
) -> None:
    rows = (captioned / "t.csv").read_text().splitlines()
    labels = [str(label) for label in open_split("digits#val", limit=30).labels.repeat(2)]
    table = captioned / "both.csv"
    table.write_text("\n".join(f"{row},{label}" for row, label in zip(rows, ["label", *labels], strict=True)))
    journal = captioned / "both.jsonl"
    split = open_split(table, classnames=[str(i) for i in range(10)])
    assert Evaluator(split, tiny_spec, journal=journal).score(weights["base"]).metric == "top1"
    by_recall = Evaluator(split, tiny_spec, metric="recall@1", journal=journal).score(weights["base"])
    plain = Evaluator(open_split(captioned / "t.csv"), tiny_spec).score(weights["base"])
    assert by_recall.metrics == plain.metrics


def test_what_cannot_be_measured_is_refused(
    captioned: Path, tiny_spec: Any, weights: Any, digits: Any
) -> None:
    with pytest.raises(SelectionError, match="recall@5 needs images with captions, and these have none"):
        Evaluator(digits, tiny_spec, metric="recall@5")
    split = open_split(captioned / "t.csv")
    with pytest.raises(DataError) as caught:
        Evaluator(split, tiny_spec, metric="top1").score(weights["base"])
    assert "--metric recall@1" in str(caught.value.hint)
    with pytest.raises(DataError, match="has captions and no classes"):
        learned_soup([weights["ft0"], weights["ft1"]], Evaluator(split, tiny_spec))
    with pytest.raises(DataError, match="has captions and no classes"):
        greedy_ensemble([weights["ft0"], weights["ft1"]], Evaluator(split, tiny_spec))


def test_each_split_is_scored_by_what_it_has(
    captioned: Path, tiny_spec: Any, weights: Any, digits: Any
) -> None:
    evaluator = Evaluator({"id": digits, "captions": open_split(captioned / "t.csv")}, tiny_spec)
    scores = evaluator.scores(weights["base"])
    assert {name: score.metric for name, score in scores.items()} == {"id": "top1", "captions": "recall@1"}


def test_the_names_of_the_metrics() -> None:
    names = [name for name, metric in METRICS.items() if metric.retrieval]
    assert names == [f"{of}recall@{k}" for of in ("", "text_", "image_") for k in KS]
    assert METRICS["text_recall@5"].title == "text recall@5"
