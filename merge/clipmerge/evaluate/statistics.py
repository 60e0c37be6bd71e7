"""Take statistics of data for the methods that merge by them, once a checkpoint, into a file beside it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmerge.data.open import open_split
from clipmerge.data.pixels import mean_and_std, normalise, pixels
from clipmerge.data.prompts import prompts
from clipmerge.data.split import Split
from clipmerge.device import float32_matmul, out_of_memory_hint, resolve_device
from clipmerge.errors import DataError, ModelError, SelectionError
from clipmerge.evaluate.heads import average_templates, class_logits, encode_text
from clipmerge.evaluate.linear_inputs import LinearInputs
from clipmerge.evaluate.setup import HEAD, Given
from clipmerge.model import ModelSpec, build_model, get_tokenizer, load_weights
from clipmerge.types import Progress
from clipmerge.weights.digest import content_digest
from clipmerge.weights.names import lacks_text, tower_of
from clipmerge.weights.statistics_files import KEY, statistics_path
from clipmerge.weights.weights import Source, Weights, as_checkpoint, as_weights, from_state_dict

__all__ = ["Sample", "Towers", "kept_at", "statistics", "write_statistics"]

Towers = Literal["both", "image"]
MOST_PROMPTS = 2048
"""Prompts through which gradients of one image are sent; more are refused."""


def statistics(
    checkpoint: Source,
    data: Split | str | Path,
    *,
    method: Literal["fisher", "regmean"],
    model: Any = None,
    templates: str | Path | Sequence[str] | None = None,
    images: int = 256,
    towers: Towers = "both",
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
    output: str | Path | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Take a checkpoint's statistics on images, and keep them beside it: `cars.fisher.safetensors`.

    "fisher": the diagonal of the Fisher information, the mean over images of the squared gradient of the
    log-likelihood of a class that is drawn from the model's own answer; labels are not looked at. "regmean": XᵀX of
    every linear layer's inputs, of the image tower on images, and of the text tower on the prompts of their classes;
    what is no linear layer (convolutions, embeddings, a ResNet's attention pool) has none and is averaged.

    Args:
        data: images; of a path the part "train".
        model, templates: as in `Evaluator`.
        images: how many are drawn.
        towers: "image" leaves the text tower out, which is then averaged; so it is of an encoder that has none.
        output: the file to write; None: beside the checkpoint.

    Returns:
        The file. Its record says of which content, on what, how many and how.

    Raises:
        SelectionError: the checkpoint is not a file, and no output is named. For "fisher" ModelError: no text tower and
            no head; DataError: images without classes, or more prompts than gradients are sent through.

    Source: Matena and Raffel 2022, arXiv 2111.09832; Jin et al. 2023, arXiv 2212.09849.
    """
    weights = as_weights(checkpoint)
    path = kept_at(weights, method, output)
    split = data if isinstance(data, Split) else open_split(data, role="train", on_progress=on_progress)
    if lacks_text(weights.names) and method == "regmean":
        towers = "image"  # an encoder without a text tower: its layers' inputs need no prompts
    elif lacks_text(weights.names) and f"{HEAD}.weight" not in weights.names:
        raise ModelError(
            f"{weights!r} has no text tower, whose prompts the Fisher information goes by",
            hint="take it of the whole model, or merge by regmean, which goes by images alone",
        )
    sample = Sample.of(
        weights, split, Given(model, templates), images, seed, resolve_device(device), on_progress,
        prompted=method == "fisher" or towers == "both",
    )  # fmt: skip
    with out_of_memory_hint("use a smaller --batch-size"), float32_matmul("fp32"):
        take = _fisher if method == "fisher" else _gram
        tensors = take(sample, towers, batch_size, seed, on_progress)
    return write_statistics(path, weights, tensors, sample.record(method, towers), force=force)


def kept_at(weights: Weights, method: str, output: str | Path | None) -> Path:
    """Return where the statistics of weights are kept.

    Raises:
        SelectionError: the weights are not a file, and no output is named.
    """
    origin = as_checkpoint(weights)
    if output is None and origin.path is None:
        raise SelectionError(
            f"{weights!r} is no file to keep statistics beside", hint="name one: output=FILE"
        )
    return Path(output) if output is not None else statistics_path(origin.path or Path(), method)


def write_statistics(
    path: Path, weights: Weights, tensors: Mapping[str, Tensor], record: Mapping[str, Any], *, force: bool
) -> Path:
    """Write a file of statistics of weights, with a record of how they were taken."""
    origin = as_checkpoint(weights)
    name = f"{origin.name}_{record['method']}"
    held = from_state_dict({key: tensor.cpu() for key, tensor in tensors.items()}, name)
    return held.save(path, force=force, metadata={KEY: {"of": content_digest(origin), **record}})


@dataclass(frozen=True)
class Sample:
    """A model in memory, images for it, and the prompts of their classes.

    Attributes:
        net: in eval mode, its parameters with gradients. pixels: (n, height, width, 3), uint8.
        tokens: class by class, each with all its templates; None without classes or a text tower.
        data, seed: the images' digest, and what they were drawn by.
    """

    net: Any
    spec: ModelSpec
    pixels: np.ndarray[Any, Any]
    normalise: Callable[[np.ndarray[Any, Any]], Tensor]
    tokens: Tensor | None
    classes: int
    templates: tuple[str, ...]
    trained_head: bool
    data: str
    seed: int

    @classmethod
    def of(
        cls,
        weights: Weights,
        split: Split,
        given: Given,
        images: int,
        seed: int,
        device: torch.device,
        on_progress: Progress | None,
        prompted: bool = True,
    ) -> "Sample":
        setup = given.setup([weights], "data", split) if prompted else None
        spec = given.spec([weights]) if setup is None else setup.spec
        net: Any = build_model(spec, device)
        load_weights(net, weights, without_text=setup is None)
        drawn = np.random.default_rng(seed).permutation(len(split))[:images]
        decoded = pixels(split.subset(np.sort(drawn)), spec.preprocess, on_progress=on_progress)
        moments = mean_and_std(spec.preprocess, device)
        tokens, head = None, setup and setup.head
        if setup is not None and head == "zero-shot":
            texts = [text for row in prompts(setup.classes, setup.templates) for text in row]
            tokens = get_tokenizer(spec)(texts).to(device)
        elif head == "captions":
            tokens = get_tokenizer(spec)(list(split.captions or ())).to(device)
        return cls(
            net.eval(),
            spec,
            decoded,
            lambda batch: normalise(torch.from_numpy(np.ascontiguousarray(batch)).to(device), *moments),
            tokens,
            0 if setup is None else len(setup.classes),
            setup.templates if setup is not None and head == "zero-shot" else (),
            f"{HEAD}.weight" in weights.names,
            split.digest,
            seed,
        )

    def record(self, method: str, towers: Towers) -> dict[str, Any]:
        """Say on what statistics were taken, and how."""
        about = {"method": method, "data": self.data, "seed": self.seed, "images": len(self.pixels)}
        return {**about, "towers": towers, "templates": list(self.templates)}

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.pixels), size):
            yield self.normalise(self.pixels[start : start + size])

    def prompt_batches(self, size: int) -> Iterator[Tensor]:
        """Yield the distinct prompts' tokens."""
        if self.tokens is not None:
            yield from torch.split(torch.unique(self.tokens, dim=0), size)


def _fisher(
    sample: Sample, towers: Towers, batch_size: int, seed: int, on_progress: Progress | None
) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information: gradients are squared image by image, never of a batch's sum."""
    net, tokens = sample.net, sample.tokens
    if not sample.classes:
        raise DataError(
            "the Fisher information needs classes, of which the model's answer is one",
            hint="give images with classes; regmean takes any images",
        )
    if tokens is not None and towers == "both" and len(tokens) > MOST_PROMPTS:
        hint = "use fewer templates, as in --templates simple, or leave the text tower out: --towers image"
        raise DataError(f"gradients go through at most {MOST_PROMPTS} prompts, not {len(tokens)}", hint=hint)
    wanted = ("visual", "head") if towers == "image" else ("visual", "head", "text", "other")
    parameters = {n: p.requires_grad_(tower_of(n) in wanted) for n, p in net.named_parameters()}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    head = None
    if tokens is not None:
        with torch.set_grad_enabled(towers == "both"):
            head = average_templates(encode_text(net, tokens), sample.classes)
    draw = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for done, image in enumerate(sample.batches(1), 1):
        logits = class_logits(net, F.normalize(net.encode_image(image).float(), dim=-1), head)
        answer = torch.multinomial(logits.detach().softmax(dim=-1).cpu()[0], 1, generator=draw).to(
            logits.device
        )
        loss = F.cross_entropy(logits, answer)
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.float() ** 2
        if on_progress:
            on_progress("gradients", done, len(sample.pixels))
    return {name: total / len(sample.pixels) for name, total in sums.items()}


@torch.no_grad()
def _gram(
    sample: Sample, towers: Towers, batch_size: int, seed: int, on_progress: Progress | None
) -> dict[str, Tensor]:
    """Compute XᵀX of the inputs of every linear layer."""
    net = sample.net
    with LinearInputs(net) as inputs:
        for done, batch in enumerate(sample.batches(batch_size), 1):
            features = F.normalize(net.encode_image(batch), dim=-1)
            if sample.trained_head:
                class_logits(net, features, None)
            if on_progress:
                on_progress(
                    "inputs of layers", min(done * batch_size, len(sample.pixels)), len(sample.pixels)
                )
        if towers == "both":
            for tokens in sample.prompt_batches(batch_size):
                encode_text(net, tokens)
    sums: dict[str, Tensor] = inputs.sums
    return sums
