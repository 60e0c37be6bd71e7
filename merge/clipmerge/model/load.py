"""Load weights into a model in place, and take a model's tensors as Weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.model.build import build_model
from clipmerge.model.spec import ModelSpec
from clipmerge.weights.record import FORMAT, write_record
from clipmerge.weights.weights import Weights, from_state_dict

if TYPE_CHECKING:
    import torch

__all__ = ["load_weights", "refuse_misfit", "save_model", "weights_of"]

HEAD = "classification_head"


def load_weights(
    model: "torch.nn.Module",
    weights: "Weights",
    fill: "Callable[[Weights, torch.nn.Module], object] | None" = None,
    *,
    without_text: bool = False,
) -> None:
    """Write weights into an open_clip model in place.

    A trained head in the weights becomes `model.classification_head`; the text tower may be absent where
    there is such a head (model-soups' checkpoints), and then keeps what it held.

    Args:
        fill: what copies the tensors, in place of `Weights.load_into`.
        without_text: the text tower may be absent where there is no trained head either, for scoring by another head.

    Raises:
        ModelError: names or shapes differ; missing and unexpected ones are listed all at once.
    """
    names, copy = weights.names, fill or (lambda values, module: values.load_into(module))
    if f"{HEAD}.weight" in names:
        classes, width = weights.tensor(f"{HEAD}.weight").shape
        _fit_head(model, classes, width, bias=f"{HEAD}.bias" in names)
        copy(weights, _without_absent_text(model, names))
        return
    if hasattr(model, HEAD):
        delattr(model, HEAD)
    copy(weights, _without_absent_text(model, names) if without_text else model)


def refuse_misfit(weights: "Weights", spec: ModelSpec) -> None:
    """Refuse to record a model that the weights cannot be of, from headers alone.

    Whole towers may be missing (encoders are published without their text tower), and a trained head may be there.

    Raises:
        ModelError: names or shapes differ; all of them are listed.
    """
    weights.check_fit(build_model(spec, "meta"), whole=False)


def _fit_head(model: "torch.nn.Module", classes: int, width: int, *, bias: bool) -> None:
    """Give the model a head of this shape, where it has none or another."""
    import torch

    now = getattr(model, HEAD, None)
    if now is None or tuple(now.weight.shape) != (classes, width) or (now.bias is not None) != bias:
        device = next(model.parameters()).device
        model.add_module(HEAD, torch.nn.Linear(width, classes, bias=bias, device=device))


def _without_absent_text(model: "torch.nn.Module", names: Sequence[str]) -> "torch.nn.Module":
    """Return a view of the model (its own tensors) without the parts of the text tower that no name reaches."""
    import torch

    present = {name.split(".", 1)[0] for name in names}
    view = torch.nn.Module()
    for name, child in model.named_children():
        if name in present or name == "visual":
            view.add_module(name, child)
    for name, parameter in model.named_parameters(recurse=False):
        if name in present:
            view.register_parameter(name, parameter)
    return view


def weights_of(model: "torch.nn.Module", spec: ModelSpec, name: str = "model") -> "Weights":
    """Return the model's tensors as weights that record which model they are for."""
    record = {"format": FORMAT, "total": 1, "model": spec.to_metadata()}
    return from_state_dict(model.state_dict(), name, write_record(record))


def save_model(
    model: "torch.nn.Module",
    spec: ModelSpec,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the model as `.safetensors` in open_clip's names, with the model's record. Returns the path written."""
    name = Path(path).stem
    return weights_of(model, spec, name).save(path, metadata=dict(metadata or {}), force=force)
