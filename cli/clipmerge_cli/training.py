"""`clipmerge finetune`, `sweep` and `statistics`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import typer

from clipmerge.finetuning.settings import MethodName, Settings
from clipmerge_cli import options as shared
from clipmerge_cli import show
from clipmerge_cli.config import config_option, hidden_settings
from clipmerge_cli.groups import opt, setting
from clipmerge_cli.options import FORCE, INPUT, PLOT, SEARCH, Images, Talk, output_option
from clipmerge_cli.progress import training
from clipmerge_cli.scoring import Precision

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.finetuning.sweep import Trial
    from clipmerge.weights.weights import Weights

_KEEP, _TRIAL = "What is kept", "Every trial"


def finetune(
    *,
    train: list[str] = opt(..., "Training images; repeat for several sets.", INPUT, metavar="[NAME=]DATA"),
    base: str = opt("none", "Where training starts; 'none' trains from scratch.", INPUT, metavar="CKPT"),
    val: list[str] | None = opt(
        None, "Held-out images, scored on the way; repeat.", INPUT, metavar="[NAME=]DATA"
    ),
    output: Path = output_option(...),
    images: Images,
    settings: Settings,
    talk: Talk,
    config: Path | None = config_option(),
    head: str | None = opt(
        None,
        "trained (default of ce), frozen: the zero-shot head as it is, or a checkpoint to take it from.",
        "Method",
        metavar="HEAD",
    ),
    augment: str = setting(Settings, "augment"),
    shares: str = setting(Settings, "shares"),
    device: str = setting(Settings, "device", "auto"),
    precision: Precision = setting(Settings, "precision", "auto"),
    tensorboard: Path | None = opt(None, "Folder for its log.", _KEEP, metavar="DIR"),
    resume: bool = opt(False, "Go on from the saved state.", _KEEP),
    plot: Path | None = PLOT,
    force: bool = FORCE,
) -> None:
    """Finetune a CLIP model on labelled images; what is written is ready for soup, interpolate and patch.

        clipmerge finetune --base base.safetensors --train images/train \\
          --val images/val -o ft.safetensors
        clipmerge finetune --base base.safetensors --train digits \\
          --method lp-ft --epochs 5 -o lpft.safetensors
        clipmerge finetune --base base.safetensors --train cars/train \\
          --method ce --head frozen -o cars.safetensors
        clipmerge finetune --base base.safetensors --method ce --head frozen \\
          --train cars=cars/train --train "dtd=dtd.npz#train[:30%]" \\
          --shares root --val cars=cars/val --val dtd=dtd.npz#val -o both.safetensors
        torchrun --nproc-per-node 8 -m clipmerge finetune \\
          --base … --train … -o ft.safetensors

    Killed? The same command with --resume goes on, to the same bytes on a CPU, or on a GPU with --deterministic.
    DATA is a folder of class folders, a .npz, a CSV, WebDataset shards, Parquet, torchvision:NAME:ROOT, or digits.

    --config takes what a finetuned checkpoint records: the checkpoint itself, what clipmerge inspect --json shows of
    it, or the same as TOML, with options as keys (lr = 1e-5, train = "images/train").

    Several sets are trained on together, with one softmax over the prompts of all.

    --method ce --head frozen trains the image tower alone under the base's zero-shot head, as PAINT and task
    arithmetic do: what it writes has no head and goes straight into patch, add, negate and interpolate.
    """
    augmentation = _augmentation(augment)

    with talk.loading():
        from clipmerge import distributed
        from clipmerge.data.split import shared_images
        from clipmerge.device import describe, resolve_device, resolve_precision
        from clipmerge.evaluate.setup import as_recorded
        from clipmerge.finetuning.finetune import finetune as run_finetuning
        from clipmerge.weights.weights import load

    began = perf_counter()
    sets = shared.named(train, "--train", shared.numbered("train", len(train)))
    held_out = shared.named(val or [], "--val", shared.numbered("val", len(val or [])))
    among = list(dict.fromkeys([*sets, *held_out]))
    place, computing = resolve_device(device), resolve_precision(precision, resolve_device(device))
    settings = replace(
        settings,
        augment=augmentation,
        shares=shares,
        templates=images.prompts(next(iter(sets)), among) if len(sets) == 1 else None,
        **hidden_settings(),
    )
    distributed.start(place)
    shown = {name: images.open(name, data, "train", talk, among=among) for name, data in sets.items()}
    scored = {
        name: images.open(name, data, "val", talk, among=among, limit=None) for name, data in held_out.items()
    }
    start = None if base == "none" else load(base)
    if start is not None and settings.templates is None:
        shown, scored = ({n: as_recorded(s, start) for n, s in d.items()} for d in (shown, scored))
    model = _model_text(images.model, start)
    for remark in shared_images(
        {**shown, **{f"held-out {n}" if n in shown else n: s for n, s in scored.items()}}
    ):
        talk.say(remark)
    say_held_out = f"; held out: {_images_text(scored)}" if scored else ""
    talk.say(
        f"training {model} by {settings.method} on {describe(place, computing)}: {_images_text(shown)}{say_held_out}"
    )
    with training(quiet=talk.silent) as (on_progress, on_event):
        weights = run_finetuning(
            start,
            shown,
            val=scored,
            head=head,
            out=output,
            model=images.model,
            settings=replace(settings, device=str(place), precision=computing),
            resume=resume,
            tensorboard=tensorboard,
            force=force,
            on_progress=on_progress,
            on_event=on_event,
        )
    if show.is_first():
        if plot is not None:
            from clipmerge.figures import draw
            from clipmerge.finetuning.log import read

            draw.training(read(output.with_name(f"{output.stem}.log.jsonl")), plot)
        done = weights.record.get("training", {})
        seconds = perf_counter() - began
        if talk.json:
            facts = {"training": done, "prompts": weights.prompts, "seconds": round(seconds, 1)}
            show.document({"file": output, **facts})
        talk.say(f"{_scores(done)}{done.get('step', 0)} steps in {show.duration(seconds)}")
        talk.say(f"wrote {show.short(output)}")
    distributed.finish()


def _model_text(model: str | None, base: "Weights | None") -> str:
    """Say which model trains, and from where that is known."""
    import clipmerge

    if base is None and model is None:
        return "a model"  # finetune refuses it in its own words
    name = clipmerge.resolve_model(model, *([] if base is None else [base])).name
    return f"{name} ({'--model' if model else f'as {base!r} records'})"


def _images_text(sets: "Mapping[str, Split]") -> str:
    """Say how many images of how many classes there are, of which data and part, and with which prompts."""
    from clipmerge.data.prompts import templates

    texts = []
    for split in sets.values():
        source = split.source + (f", #{split.part}" if split.part and "#" not in split.source else "")
        prompts = templates(None, split)
        what = f"{len(split.classes)} classes as {prompts[0]!r}" if split.classes else "captions"
        more = f" and {len(prompts) - 1} more" if split.classes and len(prompts) > 1 else ""
        texts.append(f"{len(split)} images of {source}, {what}{more}")
    return "; ".join(texts)


def _scores(training: Mapping[str, Any]) -> str:
    """Return the final held-out scores as a remark begins with them: `held-out 92.05 %, loss 0.213; `."""
    scores = training.get("scores")
    return f"held-out {show.percent(scores['top1'])} %, loss {scores['loss']:.3f}; " if scores else ""


def _augmentation(text: str) -> str | Mapping[str, Any]:
    """Return a JSON object (open_clip's aug-cfg), or the steps as they are."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--augment") from error


def sweep(
    *,
    train: str = opt(..., "Training images.", INPUT, metavar="DATA"),
    val: str = opt(..., "Held-out images.", INPUT, metavar="DATA"),
    output: Path = opt(..., "Folder for the checkpoints.", SEARCH, "--output", "-o", metavar="DIR"),
    base: str = opt(..., "Where every trial starts.", INPUT, metavar="CKPT"),
    images: Images,
    talk: Talk,
    trials: int = opt(72, "How many in all.", SEARCH, min=1),
    space: str = opt("soups", "soups (the model-soups paper's), or a TOML file.", SEARCH),
    storage: str | None = opt(None, "Optuna's database; default: a file in DIR.", SEARCH, metavar="URL"),
    sampler: Literal["random", "tpe"] = opt("random", "How trials are drawn.", SEARCH),
    retries: int = opt(2, "How often a trial that dies is tried again.", SEARCH, min=0),
    seed: int = opt(0, "Seed of the draws.", SEARCH),
    method: MethodName | None = opt(None, "As in finetune; default: the space's (soups: lp-ft).", _TRIAL),
    batch_size: int = setting(Settings, "batch_size", panel=_TRIAL),
    device: str = setting(Settings, "device", "auto", _TRIAL),
    precision: Precision = setting(Settings, "precision", "auto", _TRIAL),
) -> None:
    """Finetune many times over a search space; what is left is ready for a soup.

        clipmerge sweep --base base.safetensors --train images/train \\
          --val images/val --trials 72 -o runs/
        clipmerge soup runs/trial-*.safetensors --greedy \\
          --val images/val -o soup.safetensors

    Start it as often as you like, on one machine or with a shared --storage on many: each worker takes trials until
    none is left. Killed workers' trials are taken over; called again, a sweep goes on.
    """
    from clipmerge.finetuning.sweep import finetune_sweep, load_space, table
    from clipmerge.weights.weights import load

    trial_space = load_space(space)
    if method is not None:
        trial_space = replace(trial_space, fixed={**trial_space.fixed, "method": method})
    place, computing = talk.device("training", device, precision)

    def say_trial(trial: "Trial", done: int) -> None:
        talk.say(f"{done}/{trials}  {trial.file.name}  held-out {show.percent(trial.score)} %")

    options: dict[str, Any] = {"storage": storage, "sampler": sampler, "seed": seed, "retries": retries}
    options |= {"model": images.model, "templates": images.prompts("train"), "batch_size": batch_size}
    finished = finetune_sweep(
        None if base == "none" else load(base),
        images.open("train", train, "train", talk),
        images.open("val", val, "val", talk, limit=None),
        output,
        trials=trials,
        space=trial_space,
        on_trial=say_trial,
        device=str(place),
        precision=computing,
        **options,
    )
    rows = table(finished)
    if talk.json:
        show.document(rows)
    else:
        columns = list(rows[0])
        show.table(columns, [[row.get(column) for column in columns] for row in rows])


def statistics(
    *,
    checkpoints: list[str] = shared.CHECKPOINTS,
    method: Literal["fisher", "regmean", "regmean_plus"] = opt(..., "The method that they are for."),
    data: list[str] = opt(
        ..., "Images: one for all checkpoints, or one each, in order.", INPUT, metavar="DATA"
    ),
    images: Images,
    count: int = opt(256, "Images to draw.", INPUT, "--images", min=1),
    towers: Literal["both", "image"] = opt(
        "both", "image: leave the text tower out, which is then averaged."
    ),
    off_diagonal: float | None = opt(
        None, "What `regmean_plus` will be given as off_diagonal; default 0.95.", min=0, max=1
    ),
    batch_size: int = opt(32, "Images at a time.", None, min=1),
    seed: int = shared.SEED,
    device: str = shared.DEVICE,
    force: bool = FORCE,
    talk: Talk,
) -> None:
    """Take what a method needs to know of each checkpoint on images, once, and keep it beside the checkpoint.

    fisher: the diagonal of the Fisher information (labels are not used). regmean: the Gram matrices of the inputs of
    every linear layer. regmean_plus: the same of all checkpoints together, each block's behind the blocks that are
    merged already. Then the method needs neither images nor a model:

        clipmerge statistics cars.safetensors signs.safetensors --model ViT-B-32 \\
          --method regmean --data cars/train --data signs/train
        clipmerge merge "regmean(\\[cars, signs])" cars=cars.safetensors \\
          signs=signs.safetensors -o both.safetensors
    """
    if len(data) not in (1, len(checkpoints)):
        message = (
            f"give images once, or for each of the {len(checkpoints)} checkpoints, not {len(data)} times"
        )
        raise typer.BadParameter(message, param_hint="--data")
    if off_diagonal is not None and method != "regmean_plus":
        raise typer.BadParameter("goes with --method regmean_plus", param_hint="--off-diagonal")
    with talk.loading():
        from clipmerge.checkpoint.output import check_target
        from clipmerge.evaluate.regmean_plus import statistics_together
        from clipmerge.evaluate.statistics import statistics as take
        from clipmerge.weights.statistics_files import statistics_path

    for checkpoint in checkpoints:
        check_target(statistics_path(Path(checkpoint), method), force=force)
    splits = {text: images.open("data", text, "train", talk, among=("data",)) for text in dict.fromkeys(data)}
    of_each = [splits[text] for text in data * (1 if len(data) > 1 else len(checkpoints))]
    options: dict[str, Any] = {
        "model": images.model, "images": count, "towers": towers, "batch_size": batch_size, "seed": seed,
        "device": device, "force": force,
    }  # fmt: skip
    if method == "regmean_plus":
        options |= {} if off_diagonal is None else {"off_diagonal": off_diagonal}
        with talk.progress() as on_progress:
            written = statistics_together(checkpoints, of_each, on_progress=on_progress, **options)
    else:
        written = []
        for checkpoint, split in zip(checkpoints, of_each, strict=True):
            with talk.progress(checkpoint) as on_progress:
                written.append(take(checkpoint, split, method=method, on_progress=on_progress, **options))
    for path, split in zip(written, of_each, strict=True):
        talk.say(f"wrote {show.short(path)}: {method} of {min(count, len(split))} images")
    if talk.json:
        show.document({"kind": "statistics", "method": method, "files": written})
