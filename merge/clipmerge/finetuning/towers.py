"""The two towers as one module whose forward pass is a training step's, so that DDP, FSDP and compile can wrap it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clipmerge.evaluate.heads import encode_text

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num

__all__ = ["Towers", "trained_parameters", "wrapped"]

HEAD = "classification_head"


class Towers(nn.Module):
    """Pixels and tokens → unit features in fp32, each side only where it is asked for.

    Args:
        model: an open_clip model, with a `classification_head` or without.
        preprocess: open_clip's preprocess_cfg, for mean and std.
        precision: "fp32", "bf16" or "fp16": what autocast computes the towers in.
        channels_last: memory layout of the pixels (convolutional towers on a GPU).
    """

    offset: Tensor
    spread: Tensor
    white: Tensor

    def __init__(
        self,
        model: nn.Module,
        preprocess: Mapping[str, Any],
        *,
        precision: str = "fp32",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        if channels_last:
            model.get_submodule("visual").to(memory_format=torch.channels_last)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        device = next(model.parameters()).device
        for name, values in (
            ("offset", preprocess["mean"]),
            ("spread", preprocess["std"]),
            ("white", [255.0]),
        ):
            numbers = torch.tensor(list(values), dtype=torch.float32, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, numbers, persistent=False)

    def forward(
        self,
        pixels: "Num[Tensor, 'batch 3 height width'] | None",
        tokens: "Int[Tensor, 'prompts context'] | None" = None,
        length: int | None = None,
    ) -> "tuple[Float[Tensor, 'batch d'] | None, Float[Tensor, 'prompts d'] | None]":
        """Features of pixels in 0…255 and of prompts cut at `length` tokens."""
        image = text = None
        with self._autocast((pixels if pixels is not None else tokens).device.type):  # type: ignore[union-attr]
            if pixels is not None:
                image = self.model.encode_image(self.prepared(pixels))  # type: ignore[operator]
            if tokens is not None:
                text = encode_text(self.model, tokens, normalize=False, length=length)
        return _unit(image), _unit(text)

    def prepared(self, pixels: Tensor) -> Tensor:
        """ToTensor and Normalize, on the device."""
        scaled = pixels.to(torch.float32) / self.white  # a Python 255 would be a rounded inverse on CUDA
        return ((scaled - self.offset) / self.spread).contiguous(memory_format=self.format)

    def _autocast(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, self.dtype) if self.dtype else nullcontext()


def _unit(features: Tensor | None) -> Tensor | None:
    return None if features is None else nn.functional.normalize(features.float(), dim=-1)


def is_outside(name: str) -> bool:
    """Whether the loss uses this parameter and the towers' forward pass does not."""
    return name in ("logit_scale", "logit_bias") or name.startswith(f"{HEAD}.")


def freeze(model: nn.Module, *, image: bool, text: bool, scale: bool) -> None:
    """Let the named sides train, and a head where there is one, and nothing else."""
    for name, parameter in model.named_parameters():
        if name.startswith(f"{HEAD}."):
            trains = True
        elif is_outside(name):
            trains = scale
        else:
            trains = image if name.startswith("visual.") else text
        parameter.requires_grad_(trains)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimiser gets, by the names of the checkpoint that will be written."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrapped(towers: Towers, *, sharded: bool, synced: bool, compiled: bool) -> nn.Module:
    """The towers as this world needs them.

    Args:
        sharded: FSDP2, for models that do not fit.
        synced: DDP, which averages gradients while the backward pass runs; False leaves that to the caller.
        compiled: torch.compile, of the image tower and of the text tower's blocks.
    """
    module: nn.Module = towers
    if sharded:
        _shard(towers)
    if compiled:
        for part in _transformers(towers.model):
            part.compile()
    if synced and any(p.requires_grad for n, p in towers.model.named_parameters() if not is_outside(n)):
        from torch.nn.parallel import DistributedDataParallel

        names = [f"model.{name}" for name, _ in towers.model.named_parameters() if is_outside(name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]
        device = next(towers.parameters()).device
        module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    return module


def _transformers(model: nn.Module) -> list[nn.Module]:
    """What is worth compiling: the cut of the context around the text tower's blocks stays as it is."""
    parts = [model.get_submodule("visual")]
    for name in ("transformer", "text.transformer"):
        with suppress(AttributeError):
            parts.append(model.get_submodule(name))
    return parts


def _shard(towers: Towers) -> None:
    """FSDP2: each transformer block is a unit, the rest another; what the loss uses stays whole."""
    from torch.distributed.fsdp import fully_shard

    whole = {p for name, p in towers.model.named_parameters() if is_outside(name)}
    for module in towers.model.modules():
        if type(module).__name__ in ("ResidualAttentionBlock", "Block"):
            fully_shard(module)
    fully_shard(towers, ignored_params=whole, reshard_after_forward=False)


def unsynced(module: nn.Module) -> AbstractContextManager[object]:
    """Within, gradients of DDP's towers are added up on each rank and not yet averaged."""
    no_sync = getattr(module, "no_sync", None)
    return cast("AbstractContextManager[object]", no_sync()) if no_sync else nullcontext()
