"""One model that stays in memory: weights are copied and means interpolated into it, never through a file."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clipmerge.checkpoint.read import mapped
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.checkpoint.tensors import Tensor as Stored
from clipmerge.dtypes import torch_dtype
from clipmerge.errors import MismatchError
from clipmerge.evaluate.heads import text_digest
from clipmerge.model import ModelSpec, build_model, load_weights
from clipmerge.types import Bytes
from clipmerge.weights.names import tower_of
from clipmerge.weights.weights import Weights

__all__ = ["Resident", "Upload", "tensors_of"]

_BUFFER = 64 << 20
"""Bytes of a pinned buffer: large enough for a copy at full speed, small enough to be filled from cache."""


class Resident:
    """An open_clip model on its device, in fp32, and (for greedy soups) one flat copy of a mean beside it.

    Attributes:
        module: the model; its tensors keep their place for the whole of a search.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.device = device
        self.upload = Upload(device)
        self.module = build_model(spec, device).requires_grad_(False)
        self._names: tuple[str, ...] = ()
        self._flat: Tensor | None = None
        self._mean: dict[str, Tensor] = {}
        self._digest: str | None = None
        self._mean_digest = ""
        self._lone: Weights | None = None
        self._digests: WeakKeyDictionary[Checkpoint, str] = WeakKeyDictionary()

    def load(self, weights: Weights) -> None:
        """Copy the weights' exact values into the model; one checkpoint goes to a GPU from its mapped pages."""
        lone = weights.total == 1 and _lone_checkpoint(weights) is not None
        load_weights(self.module, weights, self._fill if lone and self.device.type == "cuda" else None)
        self._names, self._digest, self._lone = weights.names, None, weights if lone else None

    def _fill(self, weights: Weights, module: nn.Module) -> None:
        weights.check_fit(module)
        targets = module.state_dict(keep_vars=True)
        with torch.no_grad(), tensors_of(weights) as tensors:
            for name, tensor in tensors:
                targets[name].copy_(self.upload(tensor))

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
        self._mean_digest = self.text_digest()

    def lerp(self, candidate: Weights, t: float) -> None:
        """Make the model mean + t · (candidate - mean); integers and step counters stay the mean's."""
        if set(candidate.names) != set(self._names):
            differing = sorted(set(candidate.names) ^ set(self._names))
            raise MismatchError(
                f"{candidate!r} cannot join the mean: {len(differing)} names differ, first {differing[0]!r}",
                hint="every candidate needs the same tensors",
            )
        # Where the candidate has the mean's text tower, so has every point between: a + t·(a - a) = a.
        source = _lone_checkpoint(candidate)
        shared = source is not None and self._digests.get(source) == self._mean_digest
        self._digest, self._lone = self._mean_digest if shared else None, None
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
                torch.lerp(mean, self.upload(tensor).to(mean.dtype), t, out=targets[name])

    def text_digest(self) -> str:
        """Digest the text tower that the model now holds; from its file where that has the same bytes."""
        if self._digest is None:
            held = {n: t for n, t in self.module.state_dict().items() if tower_of(n) == "text"}
            lone, on_gpu = self._lone, self.device.type == "cuda"
            self._digest = _digest_of_file(lone, held) if lone is not None and on_gpu else text_digest(held)
            if lone is not None and (checkpoint := _lone_checkpoint(lone)) is not None:
                self._digests[checkpoint] = self._digest
        return self._digest

    def _floats(self) -> dict[str, Tensor]:
        """Return the model's float tensors that the weights have (a text tower may be absent), sorted by name."""
        state = self.module.state_dict(keep_vars=True)
        return {n: state[n].data for n in self._names if n in state and state[n].is_floating_point()}


class Upload:
    """Copies tensors to a device in their own dtype, to be converted there; to a GPU through two pinned buffers.

    While one buffer is copied by the GPU, the other is filled from a file's pages.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device."""
        if self._device.type != "cuda" or tensor.device.type != "cpu" or not tensor.numel():
            return tensor.to(self._device)
        if not self._buffers:
            pinned = [torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._buffers = [(buffer, torch.cuda.Event()) for buffer in pinned]  # type: ignore[no-untyped-call]
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = (t.reshape(-1).view(torch.uint8) for t in (tensor, there))
        for start in range(0, len(source), _BUFFER):
            piece = source[start : start + _BUFFER]
            buffer, copied = self._buffers[0]
            copied.synchronize()  # the last copy out of this buffer; at once where there was none
            buffer[: len(piece)].copy_(piece)
            target[start : start + len(piece)].copy_(buffer[: len(piece)], non_blocking=True)
            copied.record()
            self._buffers.reverse()
        return there


@contextmanager
def tensors_of(weights: Weights) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Yield (name, tensor on the CPU) of each tensor; those of one checkpoint are its mapped pages, not copies."""
    lone = _lone_checkpoint(weights)
    if lone is None:
        yield iter(weights.state_dict().items())
        return
    maps: dict[Path, Bytes] = {}
    yield ((name, _mapped_tensor(lone.tensors[name], maps)) for name in sorted(lone.tensors))


def _lone_checkpoint(weights: Weights) -> Checkpoint | None:
    """Return the checkpoint that the weights are; None where they are computed from others."""
    only = next(iter(weights.terms)) if len(weights.terms) == 1 else None
    return only if isinstance(only, Checkpoint) and weights.terms[only].constant == 1 else None


def _digest_of_file(weights: Weights, held: Mapping[str, Tensor]) -> str:
    with tensors_of(weights) as tensors:
        pages = {n: t for n, t in tensors if n in held and t.dtype == held[n].dtype}
        return text_digest(pages if pages.keys() == held.keys() else held)


def _mapped_tensor(tensor: Stored, maps: dict[Path, Bytes]) -> Tensor:
    array = mapped(tensor, maps)
    with warnings.catch_warnings():
        # torch warns that the pages cannot be written; nothing writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        pages = torch.from_numpy(array)
    return pages.view(torch_dtype(tensor.dtype))
