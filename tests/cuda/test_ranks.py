"""Several processes: DDP and FSDP2 by torchrun, resuming beside fewer GPUs, sweeps by several workers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import TINY
from .conftest import distance, python

pytestmark = pytest.mark.cuda

RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
DECODER = {"context_length": 32, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1, "mlp_ratio": 2}

ONE_STEP = """
import json, sys, torch, torch.distributed as dist
import clipmerge as cm
from clipmerge.device import float32_matmul, resolve_device
from clipmerge.finetuning.batches import Sampler, tokenizer_of, training_prompts
from clipmerge.finetuning.finetune import starting_model
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.finetune import apply_method
from clipmerge.finetuning.towers import full_state_dict, wrap
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, trained_parameters

name, how, *models = sys.argv[1:]
device = resolve_device(name)
backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
train = cm.open_split("digits#train", limit=32)

def gradients(model, precision, wrapped):
    net, spec = starting_model(None, model, 0, device)
    tokenizer = tokenizer_of(spec)
    prompts = training_prompts(net, tokenizer, train, ["a photo of a {}."], device)
    settings = Settings(augment="none", workers=0)
    images = Images(train, None, spec.preprocess, device, settings)
    towers = Towers(net, spec.preprocess, precision=precision)
    objective = apply_method(towers, tokenizer, prompts, images, settings)
    if wrapped:
        objective.module = wrap(towers, sharded=how == "fsdp", synced=how == "ddp", compiled=False)
    optimiser = torch.optim.SGD(trained_parameters(net).values(), lr=1e-2)
    for step in range(2):  # a parameter that takes no part is found out in the second one
        sampler = Sampler(train.labels, prompts.first, prompts.count, 0, 16)
        (batch, pixels), = images.loader()(sampler.batches(step, step + 1))
        loss = objective.backward(batch, pixels, lambda x: x)
        optimiser.step()
        optimiser.zero_grad()
    state = full_state_dict(net)[0] if wrapped and how == "fsdp" else net.state_dict()
    return {key: value.double().cpu() for key, value in state.items()}, float(loss)

def worst(ours, theirs):
    return max(float((ours[k] - v).norm() / v.norm().clamp_min(1e-6)) for k, v in theirs.items())

for model in models:
    with float32_matmul("fp32"):
        exact = gradients(model, "fp32", False)
    for precision in ("fp32", "bf16"):
        with float32_matmul(precision):
            ours, theirs = gradients(model, precision, True), gradients(model, precision, False)
        line = [model, precision, ours[1], theirs[1], worst(ours[0], exact[0]), worst(theirs[0], exact[0])]
        print(json.dumps(line), flush=True)
dist.destroy_process_group()
"""
"""Two steps through the wrapper on a world of one: what DDP and FSDP2 demand of a model on its device."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    vision = {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}
    text = {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True}
    configs = {
        "vit": TINY,
        "resnet": {**TINY, "embed_dim": 32, "vision_cfg": RESNET},
        "coca": {
            "embed_dim": 16, "vision_cfg": {**vision, "output_tokens": True}, "text_cfg": text,
            "multimodal_cfg": {**DECODER, "attn_pooler_heads": 2}, "custom_text": True,
        },
    }  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return {name: folder / f"{name}.json" for name in configs}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_wrapped_models_step_like_plain_ones(
    how: str, models: dict[str, Path], device: str, tmp_path: Path
) -> None:
    """A6 (CoCa's decoder takes no part), A7 (a ResNet's layout of memory), A8 (the mesh is the device's)."""
    program = tmp_path / "one_step.py"
    program.write_text(ONE_STEP)
    lines = python(str(program), device, how, *map(str, models.values()), ranks=1).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("[")]
    assert len(found) == 2 * len(models)
    for model, precision, ours, theirs, wrapped, plain in found:
        tolerance = 1e-3 if precision == "fp32" else 3e-2
        assert ours == pytest.approx(theirs, rel=tolerance), (model, precision)
        # In bf16 a bias that began at 0 is all rounding: the plain step's own error is the measure.
        assert wrapped < (1e-3 if precision == "fp32" else 2 * plain), (model, precision)


FINETUNE = """
import json, sys
import clipmerge as cm
base, out, model, device, options = sys.argv[1:]
options = json.loads(options)
stop = options.pop("stop", None)

def progress(what, done, total):
    if what == "steps" and done == stop:
        raise SystemExit(0)

train = cm.open_split("digits#train", limit=60)
usual = {"lr": 1e-3, "steps": 6, "augment": "none", "workers": 0, "precision": "fp32", "save_every": 1}
options = {**usual, **options}
base = cm.load(base) if base else None
cm.finetune(base, train, out=out, model=model, device=device, on_progress=progress, **options)
"""


@pytest.fixture
def launch(tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, device: str) -> Callable[..., Any]:
    """`finetune` in processes of its own."""
    program = tmp_path / "program.py"
    program.write_text(FINETUNE)

    def run(
        name: str, ranks: int, model: Path | None = None, visible: str | None = None, **options: Any
    ) -> Any:
        import clipmerge as cm

        out = tmp_path / f"{name}.safetensors"
        base = "" if model else str(tiny_checkpoints["base"])
        arguments = [str(program), base, str(out), str(model or tiny_model_file), device, json.dumps(options)]
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        python(*arguments, ranks=ranks if ranks > 1 else 0, **environment)
        return cm.load(out) if out.exists() else None

    return run


@pytest.mark.cuda(gpus=2)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("vit", {}),
        ("vit", {"fsdp": True}),
        ("vit", {"fsdp": True, "method": "ce", "ema": 0.9, "clip_grad": 1.0}),
        ("vit", {"chunk": 4}),
        ("resnet", {"fsdp": True}),
        ("coca", {}),
        ("coca", {"fsdp": True}),
    ],
    ids=str,
)
def test_two_gpus_train_what_one_does(
    model: str, options: dict[str, Any], models: dict[str, Path], launch: Callable[..., Any]
) -> None:
    start = None if model == "vit" else models[model]
    two = launch("two", 2, start, batch_size=8, **options)
    one = launch("one", 1, start, batch_size=16, **{k: v for k, v in options.items() if k != "fsdp"})
    assert distance(two, one) < (0.1 if model == "resnet" else 2e-2)  # batch statistics are each rank's own


@pytest.mark.cuda(gpus=2)
def test_a_state_saved_beside_two_gpus_goes_on_beside_one(launch: Callable[..., Any]) -> None:
    whole = launch("whole", 1, batch_size=16)
    launch("part", 1, batch_size=16, stop=4)
    assert distance(launch("part", 1, visible="0", batch_size=16, resume=True), whole) < 2e-2


SPACE = """
[lr]
low = 1e-4
high = 1e-2
log = true
[fixed]
method = "lp-ft"
steps = 2
"""


def sweep(folder: Path, device: str, base: Path, model: Path) -> list[str]:
    (folder.parent / "space.toml").write_text(SPACE)
    return ["-m", "clipmerge", "sweep", "--base", str(base), "--model", str(model), "--train", "digits#train",
            "--val", "digits#val", "--limit", "60", "--trials", "4", "--space", str(folder.parent / "space.toml"),
            "--batch-size", "16", "--device", device, "--precision", "fp32", "-o", str(folder), "--quiet"]  # fmt: skip


def test_workers_share_a_sweep(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, device: str
) -> None:
    """Two that were started by hand, on one GPU, leave the files of one; trials start from a probe (finding A1)."""
    from concurrent.futures import ThreadPoolExecutor

    import clipmerge as cm

    base, model = tiny_checkpoints["base"], tiny_model_file
    folders = [tmp_path / "alone", tmp_path / "shared", tmp_path / "shared"]
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(python, *sweep(folder, device, base, model)) for folder in folders]:
            done.result()
    names = [path.name for path in sorted((tmp_path / "alone").glob("trial-*.safetensors"))]
    assert len(names) == 4
    assert [path.name for path in sorted((tmp_path / "shared").glob("trial-*.safetensors"))] == names
    for name in names:
        assert distance(cm.load(tmp_path / "shared" / name), cm.load(tmp_path / "alone" / name)) < 2e-2


@pytest.mark.cuda(gpus=2)
def test_torchruns_processes_are_workers_of_a_sweep(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, device: str
) -> None:
    """Each draws its own trials, on its own GPU; their gradients never meet (finding A2)."""
    import clipmerge as cm

    base, model = tiny_checkpoints["base"], tiny_model_file
    python(*sweep(tmp_path / "alone", device, base, model))
    python(*sweep(tmp_path / "shared", device, base, model), ranks=2)
    for path in (tmp_path / "alone").glob("trial-*.safetensors"):
        assert distance(cm.load(tmp_path / "shared" / path.name), cm.load(path)) < 2e-2


SCORE = """
import json, os, sys
import clipmerge as cm
model, device, *paths = sys.argv[1:]
evaluator = cm.Evaluator({"val": cm.open_split("digits#val")}, model, device=device, precision="fp32", batch_size=16)
result = cm.greedy_soup(paths, evaluator)
if os.environ.get("RANK", "0") == "0":
    print(json.dumps([list(result.ingredients), result.score.value]))
"""


@pytest.mark.cuda(gpus=2)
def test_two_gpus_choose_the_soup_of_one(
    tiny_checkpoints: Any, tiny_model_file: Path, tmp_path: Path, device: str
) -> None:
    program = tmp_path / "score.py"
    program.write_text(SCORE)
    arguments = [
        str(program),
        str(tiny_model_file),
        device,
        *(str(tiny_checkpoints[f"ft{i}"]) for i in range(5)),
    ]
    two, one = (json.loads(python(*arguments, ranks=ranks).splitlines()[-1]) for ranks in (2, 1))
    assert two == one
