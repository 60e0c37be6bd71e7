"""One model that stays in memory: weights are copied and means interpolated into it, never through a file."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
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
from clipmerge.evaluate.device_checkpoints import DeviceCheckpoints, lone_checkpoint
from clipmerge.evaluate.heads import text_digest
from clipmerge.model import ModelSpec, build_model, load_weights
from clipmerge.types import Bytes
from clipmerge.weights.names import lacks_text, tower_of
from clipmerge.weights.weights import Weights

__all__ = ["Resident", "tensors_of"]

_LOWERS = ("cuda",)
"""Devices on which a plain image tower in half precision is held in that precision, beside its fp32 weights."""


class Resident:
    """An open_clip model on its device, in fp32, and (for greedy soups) one flat copy of a mean beside it.

    Attributes:
        module: the model; its tensors keep their place for the whole of a search.
        checkpoints: what has been copied to the device, if that is a GPU.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.device = device
        self.checkpoints = DeviceCheckpoints(device)
        self.module = build_model(spec, device).requires_grad_(False)
        self._names: tuple[str, ...] = ()
        self._flat: Tensor | None = None
        self._mean: dict[str, Tensor] = {}
        self._digest: str | None = None
        self._mean_digest = ""
        self._lone: Checkpoint | None = None
        self._digests: WeakKeyDictionary[Checkpoint, str] = WeakKeyDictionary()
        self._digested: tuple[str, dict[str, Tensor]] | None = None
        self._lowered: nn.Module | None = None
        self._lowered_is_current = False

    def load(self, weights: Weights) -> None:
        """Copy the weights' exact values into the model; a GPU computes them where it can."""
        load_weights(self.module, weights, self._fill, without_text=lacks_text(weights.names))
        self._names, self._digest, self._lone = weights.names, None, lone_checkpoint(weights)
        self._lowered_is_current = False

    def _fill(self, weights: Weights, module: nn.Module) -> None:
        there = self.checkpoints.tensors(weights)
        if there is None:
            weights.load_into(module)
            return
        weights.check_fit(module)
        targets = module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in there:
                targets[name].copy_(tensor)

    def lowered(self, dtype: torch.dtype | None) -> nn.Module | None:
        """Return the model with its image tower in `dtype`, both weights and arithmetic; None where autocast is right.

        Autocast rounds each weight anew for each batch, normalises in fp32 and leaves torch's fused attention aside: a
        third of a ViT-B/32's pass. What is rounded is the same but for the gains and offsets of LayerNorm. Other
        towers than open_clip's transformer may want fp32 for their statistics.
        """
        from open_clip.transformer import VisionTransformer

        visual = self.module.get_submodule("visual")
        if dtype is None or self.device.type not in _LOWERS or not isinstance(visual, VisionTransformer):
            return None
        with torch.inference_mode(False), torch.no_grad():
            if self._lowered is None:
                self._lowered = copy(self.module)
                self._lowered._modules = {**self.module._modules, "visual": deepcopy(visual).to(dtype)}
            if not self._lowered_is_current:
                halves, wholes = self._lowered.get_submodule("visual").state_dict(), visual.state_dict()
                torch._foreach_copy_([halves[name] for name in wholes], list(wholes.values()))
                self._lowered_is_current = True
        return self._lowered

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
        source = lone_checkpoint(candidate)
        shared = source is not None and self._digests.get(source) == self._mean_digest
        self._digest, self._lone = self._mean_digest if shared else None, None
        self._lowered_is_current = False
        targets, there = self._floats(), self.checkpoints.tensors(candidate)
        with torch.no_grad(), nullcontext(there) if there else tensors_of(candidate, self.device) as tensors:
            for name, tensor in tensors:
                if name not in targets:
                    continue
                mean = self._mean[name]
                if tensor.shape != mean.shape:
                    raise MismatchError(
                        f"{name!r} is {list(tensor.shape)} in {candidate!r}, {list(mean.shape)} in the mean",
                        hint="every candidate needs the same tensors",
                    )
                torch.lerp(mean, tensor.to(mean), t, out=targets[name])

    def text_digest(self) -> str:
        """Digest the text tower that the model now holds."""
        if self._digest is None:
            held = {n: t for n, t in self.module.state_dict().items() if tower_of(n) == "text"}
            self._digest = self._digest_if_known(held) or text_digest(held)
            if self.checkpoints.computes and (self._digested is None or self._digested[0] != self._digest):
                self._digested = self._digest, {name: tensor.clone() for name, tensor in held.items()}
            if self._lone is not None:
                self._digests[self._lone] = self._digest
        return self._digest

    def _digest_if_known(self, held: Mapping[str, Tensor]) -> str | None:
        """Return the digest taken last if the tower has the same bits: a GPU compares sooner than it hands over."""
        if self._digested is None or self._digested[1].keys() != held.keys():
            return None
        digest, before = self._digested
        same = all(_bits_equal(tensor, before[name]) for name, tensor in held.items())
        return digest if same else None

    def _floats(self) -> dict[str, Tensor]:
        """Return the model's float tensors that the weights have (a text tower may be absent), sorted by name."""
        state = self.module.state_dict(keep_vars=True)
        return {n: state[n].data for n in self._names if n in state and state[n].is_floating_point()}


@contextmanager
def tensors_of(
    weights: Weights, device: torch.device | None = None
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Yield (name, tensor on the CPU) of each tensor; those of one checkpoint are its mapped pages, not copies.

    Args:
        device: as for `Weights.save`.
    """
    lone = lone_checkpoint(weights)
    if lone is None:
        yield iter(weights.state_dict(device=device).items())
        return
    maps: dict[Path, Bytes] = {}
    yield ((name, _mapped_tensor(lone.tensors[name], maps)) for name in sorted(lone.tensors))


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same to the bit: -0 is not 0 here."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


def _mapped_tensor(tensor: Stored, maps: dict[Path, Bytes]) -> Tensor:
    array = mapped(tensor, maps)
    with warnings.catch_warnings():
        # torch warns that the pages cannot be written; nothing writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        pages = torch.from_numpy(array)
    return pages.view(torch_dtype(tensor.dtype))
