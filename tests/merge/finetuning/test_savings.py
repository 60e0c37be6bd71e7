"""Exact savings: the gradient of the plain step, to fp32 rounding."""

from typing import Any

import numpy as np
import pytest
import torch

from clipmerge.finetuning import losses
from clipmerge.finetuning.batches import Batch, tokenizer_of, training_prompts, unique_prompts
from clipmerge.finetuning.objective import Contrastive, cached_backward
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, freeze


@pytest.fixture
def towers(tiny_spec: Any) -> Towers:
    from clipmerge.model import build_model

    model = build_model(tiny_spec, seed=0)
    freeze(model, image=True, text=True, scale=True)
    return Towers(model, tiny_spec.preprocess)


@pytest.fixture
def prompts(towers: Towers, tiny_spec: Any, train: Any) -> Any:
    texts = ["a photo of a {}.", "a drawing of the number {}."]
    return training_prompts(towers.model, tokenizer_of(tiny_spec), train, texts, torch.device("cpu"))


def batch_of(prompts: Any, train: Any, n: int = 24) -> tuple[Batch, torch.Tensor]:
    generator = np.random.default_rng(0)
    items = generator.permutation(len(train))[:n]
    drawn = prompts.first[items] + generator.integers(prompts.count, size=n)
    pixels = torch.randint(
        0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Batch(0, 0, items, drawn, train.labels[items]), pixels


def gradients(towers: Towers) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in towers.model.named_parameters() if p.grad is not None}
    towers.zero_grad()
    return found


def plain(
    towers: Towers, prompts: Any, batch: Batch, pixels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The step as the papers write it: each image's prompt through open_clip's own text tower, whole context."""
    image = towers.model.encode_image(towers.prepare(pixels), normalize=True)
    text = towers.model.encode_text(prompts.tokens[torch.from_numpy(batch.prompts)], normalize=True)
    loss = losses.contrastive(image, text, towers.model.logit_scale.exp())
    loss.backward()
    return loss.detach(), gradients(towers)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_distinct_prompts_and_cut_context_change_no_gradient(
    towers: Towers, prompts: Any, train: Any
) -> None:
    batch, pixels = batch_of(prompts, train)
    loss, expected = plain(towers, prompts, batch, pixels)
    ours = Contrastive(towers, prompts, Settings()).backward(batch, pixels, lambda x: x)
    torch.testing.assert_close(ours, loss)
    same(gradients(towers), expected)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_gradient_caching_equals_the_big_batch(towers: Towers, prompts: Any, train: Any, chunk: int) -> None:
    batch, pixels = batch_of(prompts, train)
    loss, expected = plain(towers, prompts, batch, pixels)
    ours = Contrastive(towers, prompts, Settings(chunk=chunk)).backward(batch, pixels, lambda x: x)
    torch.testing.assert_close(ours, loss)
    same(gradients(towers), expected)


def test_padding_of_distinct_prompts_has_no_gradient(towers: Towers, prompts: Any, train: Any) -> None:
    batch, pixels = batch_of(prompts, train)
    _, expected = plain(towers, prompts, batch, pixels)
    Contrastive(towers, prompts, Settings(compile=True)).backward(batch, pixels, lambda x: x)
    same(gradients(towers), expected)


def test_distinct_prompts_point_back() -> None:
    drawn = np.array([7, 3, 7, 9, 3])
    rows, where = unique_prompts(drawn, ranks=2)
    assert rows.tolist() == [3, 7, 9, 3]
    assert rows[where].tolist() == drawn.tolist()


@pytest.mark.parametrize("trains", ["image", "text"])
def test_features_of_a_frozen_tower_are_looked_up(
    towers: Towers, prompts: Any, train: Any, trains: Any, tiny_spec: Any
) -> None:
    from clipmerge.finetuning.finetune import apply_method
    from clipmerge.finetuning.images import Images

    images = Images(train, None, tiny_spec.preprocess, torch.device("cpu"), Settings(augment="none"))
    batch, _ = batch_of(prompts, train)
    pixels = torch.from_numpy(images.plain()[batch.items])
    freeze(towers.model, image=trains == "image", text=trains == "text", scale=True)
    _, expected = plain(towers, prompts, batch, pixels)
    settings = Settings(towers=trains, augment="none")
    objective = apply_method(towers, tokenizer_of(tiny_spec), prompts, images, settings)
    table = objective.text_table if trains == "image" else objective.image_table
    assert table is not None
    objective.backward(batch, pixels, lambda x: x)
    same(gradients(towers), expected)


def test_gradient_caching_repeats_dropout() -> None:
    torch.manual_seed(3)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    x = torch.randn(6, 4)
    seen: list[torch.Tensor] = []

    def encode(piece: torch.Tensor) -> torch.Tensor:
        seen.append(layer(piece))
        return seen[-1]

    pieces = [lambda p=p: encode(p) for p in x.split(2)]
    cached_backward([pieces], lambda f: f[0].square().sum(), x.device)
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
