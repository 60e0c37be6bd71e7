"""What a GPU will do, as far as a machine without one can tell."""

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from clipmerge.data.pixels import pixels
from clipmerge.errors import DeviceError
from clipmerge.evaluate import heads, predictor
from clipmerge.evaluate.device_split import DeviceSplit
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.predictor import Predictor
from clipmerge.evaluate.setup import Given
from clipmerge.search.soup import greedy_soup


def test_reading_rows_one_batch_late_changes_no_choice(
    tiny_spec: Any, digits: Any, spread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    soups = []
    for late in ((), ("cpu",)):
        monkeypatch.setattr(predictor, "_LATE", late)
        evaluator = Evaluator(digits, tiny_spec, batch_size=8)
        soups.append(greedy_soup(spread, evaluator, strict=True).to_json())
    for soup in soups:
        assert soup.pop("images")["saved"] > 0
        for step in soup["history"]:
            step.pop("at_most")
            step.pop("images_scored")
    assert soups[0] == soups[1]


def test_a_batch_is_launched_before_the_one_before_it_is_read() -> None:
    events: list[str] = []

    def launched() -> Any:
        for i in range(3):
            events.append(f"launch {i}")
            yield i

    for i in predictor._one_late(launched()):
        events.append(f"read {i}")
    assert events == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]


def test_the_key_of_a_score_knows_precision_and_kind_of_device(
    tiny_spec: Any, digits: Any, weights: Any
) -> None:
    def key(device: str, precision: Any) -> Any:
        place, given = torch.device(device), Given(tiny_spec)
        predictor = Predictor(given, {"val": digits}, place, precision, 8, None, None)
        return predictor.key("val", weights["base"])[-1]

    kinds = (
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        ("cuda", "fp32"),
        ("cuda", "tf32"),
        ("cuda", "bf16"),
        ("cuda:1", "bf16"),
    )
    assert [key(*kind) for kind in kinds] == [
        "fp32", "bf16", "fp32 on cuda", "tf32 on cuda", "bf16 on cuda", "bf16 on cuda",
    ]  # fmt: skip
    evaluator = Evaluator(digits, tiny_spec, device="cpu", templates="a {}")
    parts = [
        digits.digest,
        tiny_spec.to_metadata(),
        ["a {}"],
        "fp32",
    ]  # as journals had it before there were GPUs
    assert (
        evaluator.data_key("val", weights["base"])
        == blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    )


def test_out_of_memory_says_which_option_helps(
    tiny_spec: Any, digits: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Predictor, "_features", full)
    for ask in (Evaluator.score, Evaluator.logits, Evaluator.features):
        with pytest.raises(DeviceError, match="ran out of memory") as caught:
            ask(Evaluator(digits, tiny_spec), weights["base"])
        assert caught.value.hint == "use a smaller --batch-size"


def test_prompts_fill_a_gpus_batch_by_tokens() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert heads._prompts_at_once(torch.full((80_000,), 10), cpu) == 256
    assert heads._prompts_at_once(torch.full((80_000,), 10), gpu) == 4096
    assert heads._prompts_at_once(torch.full((80_000,), 77), gpu) == 531
    assert heads._prompts_at_once(torch.arange(1, 400), gpu) == 256


class FakeEvent:
    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_a_pinned_slot_is_not_filled_while_its_batch_is_in_use(
    tiny_spec: Any, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU a batch is a view of its slot: what is written too early shows."""
    decoded = pixels(digits, tiny_spec.preprocess)
    split = DeviceSplit(digits, decoded, tiny_spec.preprocess, torch.device("cpu"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("S", (), {"wait_event": lambda *_: None})()
    )
    order = np.random.default_rng(0).permutation(len(digits))
    spans = [(start, min(start + 7, len(order))) for start in range(0, len(order), 7)]
    for (start, stop), batch in zip(spans, split._pinned(order, spans), strict=True):
        np.testing.assert_array_equal(batch.numpy(), decoded[order[start:stop]])
