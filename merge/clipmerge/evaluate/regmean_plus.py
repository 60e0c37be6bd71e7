"""Statistics for RegMean++: of all checkpoints together, each block's behind the blocks that are merged already."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clipmerge.checkpoint.output import check_target
from clipmerge.data.open import open_split
from clipmerge.data.split import Split
from clipmerge.device import float32_matmul, out_of_memory_hint, resolve_device
from clipmerge.errors import SelectionError
from clipmerge.evaluate.heads import encode_text
from clipmerge.evaluate.linear_inputs import LinearInputs
from clipmerge.evaluate.setup import Given
from clipmerge.evaluate.statistics import Sample, Towers, kept_at, write_statistics
from clipmerge.model import load_weights
from clipmerge.ops.statistics import regmean
from clipmerge.types import Progress
from clipmerge.weights.digest import content_digest
from clipmerge.weights.names import block_of, is_transposed, lacks_text, tower_of
from clipmerge.weights.weights import Source, as_checkpoint, as_weights, mean

__all__ = ["statistics_together"]

METHOD = "regmean_plus"

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords of a module."""


def statistics_together(
    checkpoints: Sequence[Source],
    data: Sequence[Split | str | Path],
    *,
    off_diagonal: float = 0.95,
    model: Any = None,
    templates: str | Path | Sequence[str] | None = None,
    images: int = 256,
    towers: Towers = "both",
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
    outputs: Sequence[str | Path] | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Take what `regmean_plus` needs of checkpoints that it will merge: `cars.regmean_plus.safetensors` beside each.

    Block by block, every checkpoint's own block sees what the merged blocks before it make of that checkpoint's images
    and prompts, and XᵀX of its linear layers' inputs is kept; then the block is merged, and the next one sees what it
    gives. The layers after the last block see the merged model. So the files belong together, and to these options.

    Args:
        data: images for each checkpoint, in order.
        off_diagonal: as the method will be given it.
        outputs: the files to write; None: beside the checkpoints. The others as in `statistics`.

    Returns:
        The files. Their records say of which contents, on what, how many and how.

    Raises:
        SelectionError: not as many images as checkpoints, or a checkpoint is no file and no outputs are named.

    Source: Nguyen et al. 2025, arXiv 2508.03121.
    """
    models = [as_weights(checkpoint) for checkpoint in checkpoints]
    if len(models) != len(data) or not models:
        raise SelectionError(f"{METHOD} takes images for each of {len(models)} checkpoints, not {len(data)}")
    if outputs is not None and len(outputs) != len(models):
        raise SelectionError(f"{len(models)} checkpoints have as many outputs, not {len(outputs)}")
    wanted: Sequence[str | Path | None] = outputs or [None] * len(models)
    paths = [kept_at(w, METHOD, output) for w, output in zip(models, wanted, strict=True)]
    for path in paths:
        check_target(path, force=force)
    splits = [
        d if isinstance(d, Split) else open_split(d, role="train", on_progress=on_progress) for d in data
    ]
    if any(lacks_text(w.names) for w in models):
        towers = "image"
    place, given = resolve_device(device), Given(model, templates)
    prompted = towers == "both"
    samples = [
        Sample.of(w, split, given, images, seed, place, on_progress, prompted)
        for w, split in zip(models, splits, strict=True)
    ]
    sums: list[dict[str, Tensor]] = [{} for _ in models]
    with torch.no_grad(), out_of_memory_hint("use a smaller --batch-size"), float32_matmul("fp32"):
        net = samples[0].net
        own = [{name: p.detach().clone() for name, p in sample.net.named_parameters()} for sample in samples]
        load_weights(net, mean(models), without_text=towers == "image")
        net.eval()
        for tower in ("visual", "text") if towers == "both" else ("visual",):
            runs = [_runs(net, sample, tower, batch_size) for sample in samples]
            _merge_tower(net, tower, own, runs, off_diagonal, sums)
    records = [sample.record(METHOD, towers) for sample in samples]
    digests = [content_digest(as_checkpoint(w)) for w in models]
    together = {"of": digests, "options": {"off_diagonal": off_diagonal}, "taken": records}
    return [
        write_statistics(path, w, tensors, {**record, "together": together}, force=force)
        for path, w, tensors, record in zip(paths, models, sums, records, strict=True)
    ]


def _runs(net: Any, sample: Sample, tower: str, batch_size: int) -> list[Callable[[], object]]:
    """Return what runs a tower on each batch of a sample."""
    if tower == "visual":
        return [partial(net.encode_image, batch) for batch in sample.batches(batch_size)]
    return [partial(encode_text, net, tokens) for tokens in sample.prompt_batches(batch_size)]


def _merge_tower(
    net: nn.Module,
    tower: str,
    own: Sequence[Mapping[str, Tensor]],
    runs: Sequence[Sequence[Callable[[], object]]],
    off_diagonal: float,
    sums: Sequence[dict[str, Tensor]],
) -> None:
    """Merge the linear layers of a tower in place, from the first block to what follows the last.

    Args:
        net: the mean of the models. own: each model's parameters. runs: each model's batches.
        sums: each model's XᵀX, which are added.
    """
    parameters = {name: p for name, p in net.named_parameters() if tower_of(name) == tower}
    device = next(iter(parameters.values())).device
    place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    blocks = dict.fromkeys(filter(None, map(_block_path, parameters)))

    def merge(
        names: Sequence[str], squares: Sequence[Mapping[str, Tensor]], means: Mapping[str, Tensor]
    ) -> None:
        for name in names:
            if not all(name in each for each in squares):
                parameters[name].copy_(means[name])
                continue
            points, statistics = (
                [each[name].to(place, torch.float64) for each in of] for of in (own, squares)
            )
            fitted = regmean(
                *points, statistics=statistics, off_diagonal=off_diagonal, transposed=is_transposed(name)
            )
            parameters[name].copy_(fitted)
            for each, square in zip(sums, squares, strict=True):
                each[name] = square[name].cpu()

    inputs: list[list[Call]] = []
    for path in blocks:
        module = net.get_submodule(path)
        inputs = inputs or [[_reach(module, run) for run in batches] for batches in runs]
        names = [name for name in parameters if name.startswith(f"{path}.")]
        means, squares = {name: parameters[name].clone() for name in names}, []
        for each, calls in zip(own, inputs, strict=True):
            for name in names:
                parameters[name].copy_(each[name])
            with LinearInputs(net, names) as seen:
                for args, keywords in calls:
                    module(*args, **keywords)
            squares.append(seen.sums)
        merge(names, squares, means)
        inputs = [[((module(*a, **k), *a[1:]), k) for a, k in calls] for calls in inputs]
    rest = [name for name in parameters if _block_path(name) is None]
    means, squares = {name: parameters[name].clone() for name in rest}, []
    for batches in runs:
        with LinearInputs(net, rest) as seen:
            for run in batches:
                run()
        squares.append(seen.sums)
    merge(rest, squares, means)


def _block_path(name: str) -> str | None:
    """Return the module of the block that a parameter belongs to, None outside blocks."""
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in paths if block_of(f"{path}.") is not None), None)


class _Reached(Exception):  # noqa: N818 - no error: it ends a forward pass where all is known
    pass


def _reach(module: nn.Module, run: Callable[[], object]) -> "Call":
    """Return with what a forward pass calls a module."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((args, keywords))
        raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Reached):
            run()
    finally:
        handle.remove()
    return calls[0]
