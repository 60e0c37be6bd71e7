"""One model that stays in memory: weights are copied and means interpolated into it, never through a file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from clipmerge.checkpoint.read import Mapped
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.dtypes import torch_dtype
from clipmerge.errors import MismatchError
from clipmerge.evaluate.heads import text_digest
from clipmerge.model import ModelSpec, build_model, load_weights
from clipmerge.weights.weights import Weights

__all__ = ["Resident", "tensors_of"]


class Resident:
    """An open_clip model on its device, in fp32, and (for greedy soups) one flat copy of a mean beside it.

    Attributes:
        module: the model; its tensors keep their place for the whole of a search.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.device = device
        self.module = build_model(spec, device).requires_grad_(False)
        self._names: tuple[str, ...] = ()
        self._flat: Tensor | None = None
        self._mean: dict[str, Tensor] = {}
        self._digest: str | None = None

    def load(self, weights: Weights) -> None:
        """Copy the weights' exact values into the model."""
        self._digest = None
        load_weights(self.module, weights)
        self._names = weights.names

    def hold(self) -> None:
        """Keep what the model holds as the mean that `lerp` starts from."""
        floats = self._floats()
        shapes = {name: tensor.shape for name, tensor in floats.items()}
        if self._flat is None or {name: tensor.shape for name, tensor in self._mean.items()} != shapes:
            self._flat = torch.empty(sum(t.numel() for t in floats.values()), device=self.device)
            ends = list(accumulate(t.numel() for t in floats.values()))
            self._mean = {
                name: self._flat[end - tensor.numel() : end].view(tensor.shape)
                for (name, tensor), end in zip(floats.items(), ends, strict=True)
            }
        for name, tensor in floats.items():
            self._mean[name].copy_(tensor)

    def lerp(self, candidate: Weights, t: float) -> None:
        """Make the model mean + t · (candidate - mean); integers and step counters stay the mean's."""
        if set(candidate.names) != set(self._names):
            differing = sorted(set(candidate.names) ^ set(self._names))
            raise MismatchError(
                f"{candidate!r} cannot join the mean: {len(differing)} names differ, first {differing[0]!r}",
                hint="every candidate needs the same tensors",
            )
        self._digest = None
        targets = self._floats()
        with torch.no_grad(), tensors_of(candidate) as tensors:
            for name, tensor in tensors:
                if name not in targets:
                    continue
                mean = self._mean[name]
                if tensor.shape != mean.shape:
                    raise MismatchError(
                        f"{name!r} is {list(tensor.shape)} in {candidate!r}, {list(mean.shape)} in the mean",
                        hint="every candidate needs the same tensors",
                    )
                torch.lerp(mean, tensor.to(device=self.device, dtype=mean.dtype), t, out=targets[name])

    def text_digest(self) -> str:
        """Digest the text tower that the model now holds."""
        if self._digest is None:
            self._digest = text_digest(self.module)
        return self._digest

    def _floats(self) -> dict[str, Tensor]:
        """Return the model's float tensors that the weights have (a text tower may be absent), sorted by name."""
        state = self.module.state_dict(keep_vars=True)
        return {n: state[n].data for n in self._names if n in state and state[n].is_floating_point()}


@contextmanager
def tensors_of(weights: Weights) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Yield (name, tensor on the CPU) of each tensor; those of one checkpoint are its mapped pages, not copies."""
    one = next(iter(weights.terms)) if len(weights.terms) == 1 else None
    if not isinstance(one, Checkpoint) or weights.terms[one].constant != 1:
        yield iter(weights.state_dict().items())
        return
    with Mapped() as mapped:
        yield ((name, _mapped_tensor(mapped, one, name)) for name in sorted(one.tensors))


def _mapped_tensor(mapped: Mapped, checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors[name]
    array = mapped.array(tensor)
    with warnings.catch_warnings():
        # torch warns that the pages cannot be written; nothing writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        pages = torch.from_numpy(array)
    return pages.view(torch_dtype(tensor.dtype))
