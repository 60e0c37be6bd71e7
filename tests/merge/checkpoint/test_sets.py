"""One file, several sets of weights or a wrapper's words in its names: what is meant is found, or asked."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import clipmerge
from clipmerge.checkpoint.open import open_checkpoint
from clipmerge.checkpoint.sets import WRAPPERS, choose_set
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import CheckpointError, MismatchError

Same = Callable[..., None]
StateDict = Mapping[str, Any]


def moved(state: StateDict) -> dict[str, Any]:
    """Other weights of the same model."""
    return {name: value * 1.01 for name, value in state.items()}


NAMES = (
    "visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight", "visual.transformer.resblocks.1.mlp.c_fc.bias",
    "transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight", "logit_scale",
)  # fmt: skip


@given(st.data())
def test_wrappers_words_come_off_wherever_they_stand(data: st.DataObject) -> None:
    attribute = data.draw(st.lists(st.sampled_from(["clip_model", "net", "model", "backbone"]), max_size=2))
    tensors = {}
    for name in NAMES:
        *words, last = [*attribute, *name.split(".")]
        for _ in range(data.draw(st.integers(0, 3))):
            words.insert(data.draw(st.integers(0, len(words))), data.draw(st.sampled_from(sorted(WRAPPERS))))
        tensors[".".join([*words, last])] = Tensor("F32", (1,), ())
    assert sorted(choose_set("x.pt", {"": tensors}, None).tensors) == sorted(NAMES)


def lightning(model: nn.Module) -> dict[str, Any]:
    """A LightningModule's state: the model under an attribute, a trained layer and a metric beside it."""
    module = nn.Module()
    module.clip_model = model
    return {"state_dict": module.state_dict(), "pytorch-lightning_version": "2", "global_step": 3}


def compiled(model: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.visual = torch.compile(model.visual)
        model.transformer.resblocks[0] = torch.compile(model.transformer.resblocks[0])
    return dict(model.state_dict())


def checkpointed(model: Any) -> dict[str, Any]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    block = model.visual.transformer.resblocks[1]
    model.visual.transformer.resblocks[1] = checkpoint_wrapper(block)
    state = model.state_dict()  # the wrapper's own hook takes the word off; older releases left it
    return {
        n.replace(
            "visual.transformer.resblocks.1.", "visual.transformer.resblocks.1._checkpoint_wrapped_module."
        ): t
        for n, t in state.items()
    }


def averaged(model: nn.Module) -> dict[str, Any]:
    from torch.optim.swa_utils import AveragedModel

    return dict(AveragedModel(model).state_dict())


def timm_ema(model: nn.Module) -> dict[str, Any]:
    from timm.utils import ModelEmaV2

    return dict(ModelEmaV2(model).state_dict())


@pytest.mark.parametrize("wrap", [lightning, compiled, checkpointed, averaged, timm_ema])
def test_real_wrappers_leave_the_models_names(
    wrap: Callable[[Any], Any], small_clip: Any, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    import copy

    torch.save(wrap(copy.deepcopy(small_clip)), tmp_path / "a.pt")
    assert_same(open_checkpoint(tmp_path / "a.pt"), small)


@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema_model"), ("model", "ema"),
        ("model_state_dict", "ema_state_dict"), ("state_dict", "averaged_model"), ("net", "swa_net"),
        ("state.model", "state.ema"), ("", "ema"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_two_sets_of_a_training_checkpoint_are_asked_for(
    keys: tuple[str, str], wrapper: str, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    averages, root = moved(small), {"epoch": 1}
    for key, state in zip(keys, (small, {wrapper + n: t for n, t in averages.items()}), strict=True):
        inside: Any = root
        for word in key.split(".") if key else ():
            inside = inside.setdefault(word, {})
        inside.update(state)
    path = tmp_path / "model_best.pth.tar"
    torch.save(root, path)
    with pytest.raises(CheckpointError, match="holds 2 sets of weights of one model") as caught:
        open_checkpoint(path)
    assert keys[1] in caught.value.message
    assert caught.value.hint == f"say which: {path}#raw or {path}#ema"
    assert_same(open_checkpoint(f"{path}#raw"), small)
    assert_same(open_checkpoint(f"{path}#ema"), averages)
    assert_same(open_checkpoint(f"{path}#{keys[1]}"), averages)
    assert open_checkpoint(f"{path}#ema").name == "model_best_ema"
    with pytest.raises(CheckpointError, match=r"has no weights 'emma': it holds 'raw'"):
        open_checkpoint(f"{path}#emma")


@pytest.mark.parametrize(
    "prefixes",
    [
        ("model.", "ema_model."),
        ("online_model.", "ema_model."),
        ("", "ema."),
        ("model.", "model_ema.module."),
    ],
)
def test_two_sets_under_prefixes_are_asked_for(
    prefixes: tuple[str, str], small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    averages = moved(small)
    state = {prefixes[0] + n: t for n, t in small.items()} | {prefixes[1] + n: t for n, t in averages.items()}
    state |= {"initted": torch.tensor(True), "step": torch.tensor(7), "ema_model.decay": torch.tensor(0.9)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 sets of weights of one model"):
        open_checkpoint(tmp_path / "a.safetensors")
    assert_same(open_checkpoint(f"{tmp_path}/a.safetensors#raw"), small)
    assert_same(open_checkpoint(f"{tmp_path}/a.safetensors#ema"), averages)


def test_names_without_dots_are_those_of_the_model(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    averages = moved(small)  # latent-diffusion's LitEma: a buffer's name may hold no dot
    state = {f"model.{n}": t for n, t in small.items()}
    state |= {f"model_ema.{n.replace('.', '')}": t for n, t in averages.items()}
    torch.save({"state_dict": state | {"model_ema.num_updates": torch.tensor(3)}}, tmp_path / "a.ckpt")
    assert_same(open_checkpoint(f"{tmp_path}/a.ckpt#ema"), averages)


def test_student_and_teacher_are_chosen_by_their_own_names(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    state = {f"student.{n}": t for n, t in small.items()} | {
        f"teacher.{n}": t for n, t in moved(small).items()
    }
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="'student' and 'teacher'"):
        open_checkpoint(tmp_path / "a.pt")
    assert_same(open_checkpoint(f"{tmp_path}/a.pt#teacher"), moved(small))


def test_what_is_no_other_set_of_the_model_asks_nothing(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    beside = {"criterion": {"weight": torch.ones(3)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    torch.save({"state_dict": dict(small), **beside}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert_same(checkpoint, small)
    assert checkpoint.extra["dropped"] == ("criterion.weight",)  # said by convert
    with pytest.raises(CheckpointError, match=r"has no weights 'ema': it holds one set of weights") as caught:
        open_checkpoint(f"{tmp_path}/a.pt#ema")
    assert caught.value.hint == "leave out #ema"


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({"module.a.weight": torch.ones(1), "a.weight": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(MismatchError, match=r"both stand for 'a\.weight'"):
        open_checkpoint(tmp_path / "a.pt")
    names = [f"layers.{i}.weight" for i in range(9)]
    torch.save({n: torch.ones(1, 2) for n in [*names, f"model.{names[0]}"]}, tmp_path / "b.pt")
    with pytest.raises(MismatchError, match=r"both stand for 'layers\.0\.weight'"):
        open_checkpoint(tmp_path / "b.pt")


def test_a_merge_of_two_sets_of_one_file_is_recorded_and_verified(small: StateDict, tmp_path: Path) -> None:
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": dict(small), "state_dict_ema": moved(small)}, path)
    raw, ema = (clipmerge.load(f"{path}#{choice}", "w") for choice in ("raw", "ema"))
    assert raw.checkpoints != ema.checkpoints
    raw, ema = clipmerge.load_all([f"{path}#raw", f"{path}#ema"])
    out = clipmerge.mean([raw, ema]).save(tmp_path / "out.safetensors")
    files = sorted(parent["file"] for parent in clipmerge.load(out).record["parents"].values())
    assert files == ["a.pth.tar#ema", "a.pth.tar#raw"]
    assert clipmerge.verify(out).status == "verified"


def tensors(**shapes: Any) -> dict[str, Any]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


def zero(small: StateDict, shape: tuple[int, ...]) -> dict[str, Any]:
    return {name: torch.ones(shape) for name in small}


OTHER_KINDS: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "kohya's LoRA": (lambda _: tensors(lora_te_q__lora_down__weight=(2, 4)), "an adapter"),
    "LoHa": (lambda _: tensors(m__q__hada_w1_a=(2, 4), m__q__hada_w1_b=(4, 2)), "an adapter"),
    "IA3": (lambda _: tensors(base_model__model__q__ia3_l=(4, 1)), "an adapter"),
    "optimiser": (lambda _: {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, "an optimiser's state"),
    "Trainer's optimizer.pt": (
        lambda s: {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 1}, "an optimiser's state",
    ),
    "optimiser by name": (lambda _: tensors(visual__proj__exp_avg=(2, 2)), "an optimiser's state"),
    "rng_state.pth": (
        lambda _: {"python": (3,), "cpu": torch.zeros(5056, dtype=torch.uint8)}, "holds bytes only",
    ),
    "ZeRO-3": (lambda s: {"module": zero(s, (0,)), "ds_version": "0.14"}, "placeholders without their numbers"),
    "ZeRO-3 that kept small tensors": (
        lambda s: {n: t if t.ndim < 2 else torch.ones(0) for n, t in s.items()}, "placeholders without their numbers",
    ),
    "placeholders of one number": (lambda s: zero(s, (1,)), "placeholders without their numbers"),
    "FSDP's local state": (lambda _: tensors(visual___flat_param=(99,)), "flattened parameters of one FSDP process"),
    "bitsandbytes 8 bit": (
        lambda _: {"visual.a.weight": torch.ones(4, 4, dtype=torch.int8), "visual.a.SCB": torch.ones(4)},
        "quantised weights",
    ),
    "bitsandbytes 4 bit": (lambda _: tensors(visual__a__weight__absmax=(4,)), "quantised weights"),
    "GPTQ": (lambda _: tensors(visual__a__qweight=(4, 4), visual__a__scales=(4,)), "quantised weights"),
    "fp8 with scales": (lambda _: tensors(visual__a__weight=(4, 4), visual__a__scale_weight=(1,)), "quantised weights"),
    "fp8 with an activation's scale": (lambda _: tensors(visual__a__input_scale=(1,)), "quantised weights"),
    "torch's dynamic int8": (
        lambda _: {"visual.a.scale": torch.tensor(1.0), "visual.a.zero_point": torch.tensor(0)}, "quantised weights",
    ),
    "HQQ": (lambda _: tensors(visual__a__W_q=(4, 4)), "quantised weights"),
    "pruned": (lambda _: tensors(a__weight_orig=(4, 4), a__weight_mask=(4, 4)), "still being pruned"),
    "integers": (lambda _: {"a.weight": torch.ones(2, 2, dtype=torch.uint8)}, "quantised weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_holds_no_models_numbers_is_refused_by_what_it_is(
    kind: str, small: StateDict, tmp_path: Path
) -> None:
    make, said = OTHER_KINDS[kind]
    torch.save(make(small), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert caught.value.hint


def test_zero_3_is_told_where_its_numbers_are(small: StateDict, tmp_path: Path) -> None:
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": zero(small, (0,))}, path)
    with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["n_averaged", "initted", "step", "num_updates", "decay"])
def test_counters_of_wrappers_are_left_out(
    name: str, small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    torch.save({**small, name: torch.tensor(3)}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert_same(checkpoint, small)
    assert checkpoint.extra["dropped"] == (name,)
    torch.save(
        {**small, name: torch.ones(3, 3)}, tmp_path / "b.pt"
    )  # a tensor of a model that happens to be called so
    assert name in open_checkpoint(tmp_path / "b.pt").tensors


def test_an_average_without_names_is_not_passed_over(
    small: StateDict, tmp_path: Path, assert_same: Same
) -> None:
    """torch_ema saves a list, in the order of the model's parameters."""
    shadow = {
        "decay": 0.99,
        "num_updates": 7,
        "shadow_params": list(small.values()),
        "collected_params": None,
    }
    path = tmp_path / "a.pt"
    torch.save({"model": dict(small), "ema": shadow}, path)
    for choice in ("", "#ema"):
        with pytest.raises(
            CheckpointError, match=r"an average of them, ema\.shadow_params, that has no names"
        ) as refusal:
            open_checkpoint(f"{path}{choice}")
        assert f"{path}#raw" in str(refusal.value.hint)
    assert_same(open_checkpoint(f"{path}#raw"), small)
    torch.save(shadow, path)
    with pytest.raises(CheckpointError, match="shadow_params holds an average without names"):
        open_checkpoint(path)
