"""What a GPU does with checkpoints, done on the CPU: copies through buffers, sums to the bit, a tower in bf16."""

from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch

from clipmerge.dtypes import torch_dtype
from clipmerge.evaluate import device_checkpoints, resident
from clipmerge.evaluate.device_checkpoints import DeviceCheckpoints, _round
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.resident import Resident
from clipmerge.search.soup import greedy_soup
from clipmerge.weights.weights import Weights, from_state_dict, interpolate, load, mean, slerp

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checkpoints, "_COMPUTES", ("cpu",))
    monkeypatch.setattr(device_checkpoints, "_BUFFER", 4096)


def there(weights: Weights, checkpoints: DeviceCheckpoints | None = None) -> dict[str, torch.Tensor] | None:
    tensors = (checkpoints or DeviceCheckpoints(CPU)).tensors(weights)
    return None if tensors is None else dict(tensors)


def same_bits(ours: dict[str, torch.Tensor] | None, theirs: dict[str, torch.Tensor]) -> bool:
    assert ours is not None
    assert ours.keys() == theirs.keys()
    return all(resident._bits_equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[Weights]]:
    """Random checkpoints: magnitudes from 2**-20 to 2**10, one tensor larger than the buffer, odd sizes, integers."""

    def make(count: int, dtype: str) -> list[Weights]:
        generator = np.random.default_rng(count)
        for i in range(count):
            tensors = {}
            for name, shape in {"a": (3001,), "b": (3, 5), "c": (), "d": (0,)}.items():
                values = generator.normal(size=shape) * 2.0 ** generator.integers(-20, 10, shape)
                tensors[name] = torch.tensor(values).to(torch_dtype(dtype))
            tensors |= {"num": torch.tensor(7), "bn.num_batches_tracked": torch.tensor(i)}
            from_state_dict(tensors).save(tmp_path / f"{dtype}{i}.safetensors", digests=False)
        return [load(tmp_path / f"{dtype}{i}.safetensors") for i in range(count)]

    return make


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_checkpoint_arrives_as_it_is_stored(dtype: str, files: Callable[..., list[Weights]]) -> None:
    (weights,) = files(1, dtype)
    assert same_bits(there(weights), weights.state_dict())


def test_a_transposed_tensor_arrives_row_by_row(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(2000.0).view(40, 50).T, "b": torch.ones(3)}, tmp_path / "a.pt")
    weights = load(tmp_path / "a.pt")
    assert weights.checkpoints[0].tensors["a"].strides is not None
    assert same_bits(there(weights), weights.state_dict())


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_sums_have_the_bits_of_the_cpus_pass(
    dtype: str, count: int, files: Callable[..., list[Weights]]
) -> None:
    weights = files(count, dtype)
    a, b = weights[:2]
    checkpoints = DeviceCheckpoints(CPU)
    for expression in (
        mean(weights),
        interpolate(a, b, 0.3),
        interpolate(a, b, 0.1234567891),
        a + (b - a) * {"a": 0.7},
    ):
        assert same_bits(there(expression, checkpoints), expression.state_dict()), expression


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    """1 + half a step + a little goes up; through float32, which cannot hold the little, it would be a tie."""
    step = torch.finfo(dtype).eps
    little = 2.0**-40
    values = torch.tensor(
        [1 + step / 2 + little, 1 + step / 2, -1 - step / 2 - little, 1 + step / 2 - little]
    )
    exact = torch.tensor([1 + step / 2 + little, 1 + step / 2, -1 - step / 2 - little, 1 + step / 2 - little],
                         dtype=torch.float64)  # fmt: skip
    assert _round(exact, dtype).tolist() == [1 + step, 1, -1 - step, 1]
    assert values.to(dtype).tolist() == [1, 1, -1, 1]
    assert _round(torch.tensor([1e-300, -0.0, 0.0], dtype=torch.float64), dtype).tolist() == [0, 0, 0]


def test_what_is_not_computed_there_is_left_to_the_cpu(files: Callable[..., list[Weights]]) -> None:
    a, b, c = files(3, "F32")
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2)}
    one, damaged = from_state_dict(tensors), from_state_dict({**tensors, "b": torch.tensor([0.0, torch.nan])})
    eighths = [from_state_dict({"a": torch.zeros(3).to(torch.float8_e5m2)}) for _ in range(2)]
    other = from_state_dict({**a.state_dict(), "num": torch.tensor(8)})
    for weights in (slerp(a, b, 0.3), mean([one, damaged]), mean(eighths), mean([a, b, other]), c - a):
        assert there(weights) is None, weights
    assert there(mean([a, b]), DeviceCheckpoints(CPU, keep=False)) is None


def test_copies_stay_while_their_checkpoints_live(
    files: Callable[..., list[Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, checkpoints, reads = files(3, "F32"), DeviceCheckpoints(CPU), []
    real = DeviceCheckpoints._read

    def read(self: Any, checkpoint: Any) -> Any:
        reads.append((checkpoint.name, get_ident()))
        return real(self, checkpoint)

    monkeypatch.setattr(DeviceCheckpoints, "_read", read)
    checkpoints.expect(weights)
    for each in [*weights, mean(weights), *weights]:
        there(each, checkpoints)
    assert [name for name, _ in reads] == ["F320", "F321", "F322"]
    assert [thread == get_ident() for _, thread in reads] == [True, False, False]  # the others are read ahead
    assert len(checkpoints._kept) == 3
    del each, weights
    assert len(checkpoints._kept) == 0


def test_what_does_not_fit_is_read_each_time(
    files: Callable[..., list[Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = files(2, "F16")
    monkeypatch.setattr(DeviceCheckpoints, "_has_room", lambda self, *checkpoints: not checkpoints)
    checkpoints = DeviceCheckpoints(CPU)
    checkpoints.expect(weights)
    for each in weights:
        assert same_bits(there(each, checkpoints), each.state_dict())
    assert len(checkpoints._kept) == 0
    assert there(mean(weights), checkpoints) is None


def test_a_model_is_filled_with_the_same_bits(
    tiny_spec: Any, spread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [load(path) for path in spread]
    ours = Resident(tiny_spec, CPU)
    for each in (weights[0], mean(weights[:3])):
        ours.load(each)
        assert same_bits(ours.module.state_dict(), {**ours.module.state_dict(), **each.state_dict()})
    ours.hold()
    ours.lerp(weights[3], 0.25)
    monkeypatch.setattr(device_checkpoints, "_COMPUTES", ())
    plain = Resident(tiny_spec, CPU)
    plain.load(mean(weights[:3]))
    plain.hold()
    plain.lerp(weights[3], 0.25)
    assert same_bits(ours.module.state_dict(), plain.module.state_dict())


def test_the_soup_is_the_cpus(
    tiny_spec: Any, digits: Any, spread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    soups = []
    for places in (("cpu",), ()):
        monkeypatch.setattr(device_checkpoints, "_COMPUTES", places)
        soups.append(greedy_soup(spread, Evaluator(digits, tiny_spec)).to_json())
    assert soups[0] == soups[1]


def test_the_last_text_tower_is_compared_not_digested(
    tiny_spec: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, digested, real = Resident(tiny_spec, CPU), [], resident.text_digest
    monkeypatch.setattr(resident, "text_digest", lambda tensors: digested.append(1) or real(tensors))
    tensors = weights["base"].state_dict()
    moved = {name: t + 1 if name.startswith("visual.") else t for name, t in tensors.items()}
    negated = {name: -t if name == "ln_final.bias" else t for name, t in tensors.items()}
    assert not tensors["ln_final.bias"].any()  # 0 and -0 are equal, and are other bits
    for state, count in ((tensors, 1), (moved, 1), (negated, 2), (tensors, 3)):
        ours.load(from_state_dict(state))
        assert ours.text_digest() == real(ours.module.state_dict())
        assert len(digested) == count


def test_an_image_tower_in_bf16_follows_its_weights(
    tiny_spec: Any, digits: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Evaluator(digits, tiny_spec, precision="fp32").features(weights["ft0"])
    automatic = Evaluator(digits, tiny_spec, precision="bf16").features(weights["ft0"])
    monkeypatch.setattr(resident, "_LOWERS", ("cpu",))
    ours = Evaluator(digits, tiny_spec, precision="bf16")
    for each in ("base", "ft1", "ft0"):
        features = ours.features(weights[each])
    lowered: Any = ours.predictor.resident._lowered
    assert {p.dtype for p in lowered.visual.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ours.predictor.resident.module.parameters()} == {torch.float32}
    assert float((features - exact).abs().max()) < 2 * float((automatic - exact).abs().max())
    ours.predictor.resident.hold()
    ours.predictor.resident.lerp(weights["ft1"], 1.0)
    there = Evaluator(digits, tiny_spec, precision="bf16").features(weights["ft1"])
    assert torch.equal(ours.predictor.collect("val", "features"), there)
    assert ours.predictor.resident.lowered(None) is None


def test_other_towers_stay_in_autocast(
    tiny_model_config: Any, tiny_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm's statistics want fp32."""
    from clipmerge.model import ModelSpec

    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    monkeypatch.setattr(resident, "_LOWERS", ("cpu",))
    spec = ModelSpec(
        "resnet", {**tiny_model_config, "embed_dim": 32, "vision_cfg": resnet}, tiny_spec.preprocess
    )
    assert Resident(spec, CPU).lowered(torch.bfloat16) is None
