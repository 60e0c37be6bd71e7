"""The two towers as one module whose forward pass is a training step's, and the same over many devices."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from clipmerge.data.pixels import mean_and_std, normalise
from clipmerge.device import Precision, autocast, to_device
from clipmerge.distributed import world
from clipmerge.evaluate.heads import encode_prompts, encode_text, evaluating
from clipmerge.types import Pixels, Progress

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num

__all__ = [
    "HEAD", "Towers", "freeze", "full_state_dict", "has_batch_norm", "image_features", "is_outside",
    "load_full_state_dict", "local_shard", "set_modes", "trained_parameters", "unsynced", "wrap",
]  # fmt: skip

HEAD = "classification_head"


class Towers(nn.Module):
    """Turn pixels and tokens into unit features in fp32, each side only where it is asked for.

    Args:
        model: an open_clip model, with a `classification_head` or without.
        preprocess: open_clip's preprocess_cfg, for mean and std.
        precision: what the towers compute in; features, heads and losses are fp32.
        channels_last: memory layout of pixels and convolutions; by default on a GPU for convolutions beyond the
            patches, on a CPU for those with BatchNorm.
    """

    mean: "Float[Tensor, '3 1 1']"
    std: "Float[Tensor, '3 1 1']"

    def __init__(
        self,
        model: nn.Module,
        preprocess: Mapping[str, Any],
        precision: Precision = "fp32",
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        device = next(model.parameters()).device
        if channels_last is None:
            convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
            channels_last = convolutions > 1 if device.type == "cuda" else has_batch_norm(model)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = mean_and_std(preprocess, device)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(
        self,
        pixels: "Num[Tensor, 'batch 3 height width'] | None",
        tokens: "Int[Tensor, 'prompts context'] | None" = None,
        length: int | None = None,
    ) -> "tuple[Float[Tensor, 'batch d'] | None, Float[Tensor, 'prompts d'] | None]":
        """Return features of pixels in 0…255 and of prompts cut at `length` tokens."""
        image = text = None
        with autocast(self.precision, self.mean.device):
            if pixels is not None:
                image = self.model.encode_image(self.prepare(pixels))  # type: ignore[operator]
            if tokens is not None:
                text = encode_text(self.model, tokens, normalize=False, length=length)
        return _unit(image), _unit(text)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Do what ToTensor and Normalize do, on the device."""
        return normalise(pixels, self.mean, self.std).contiguous(memory_format=self.format)

    def prompt_features(self, tokens: "Int[Tensor, 'prompts context']") -> "Float[Tensor, 'prompts d']":
        """Return unit features of every prompt, without gradient."""
        return encode_prompts(self.model, tokens, encode=lambda batch, length: self(None, batch, length)[1])

    @property
    def exp_scale(self) -> "Float[Tensor, '']":
        """What logits are multiplied by: exp(logit_scale)."""
        return cast("Tensor", self.model.logit_scale).exp()


def _unit(features: Tensor | None) -> Tensor | None:
    return None if features is None else nn.functional.normalize(features.float(), dim=-1)


@torch.no_grad()
def image_features(
    towers: nn.Module,
    pixels: "Pixels | Tensor",
    device: torch.device,
    batch_size: int,
    *,
    what: str = "features",
    on_progress: Progress | None = None,
) -> "Float[Tensor, 'images d']":
    """Return unit features of every image in eval mode, on the device."""
    features = []
    with evaluating(towers):
        for start in range(0, len(pixels), batch_size):
            piece = pixels[start : start + batch_size]
            if not isinstance(piece, Tensor):
                piece = to_device(piece, device)
            features.append(towers(piece)[0])
            if on_progress is not None:
                on_progress(what, min(start + batch_size, len(pixels)), len(pixels))
    return torch.cat(features)


def is_outside(name: str) -> bool:
    """Return whether the loss uses this parameter and the towers' forward pass does not."""
    return name in ("logit_scale", "logit_bias") or name.startswith(f"{HEAD}.")


def freeze(model: nn.Module, *, image: bool, text: bool, scale: bool) -> None:
    """Let the named sides train, and a head where there is one, and nothing else.

    CoCa's text decoder serves neither `encode_image` nor `encode_text`: it never gets a gradient, which DDP would
    take for an error.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(f"{HEAD}."):
            trains = True
        elif is_outside(name):
            trains = scale
        elif name.startswith("text_decoder."):
            trains = False
        else:
            trains = image if name.startswith("visual.") else text
        parameter.requires_grad_(trains)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether some part keeps running statistics of batches."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def set_modes(model: nn.Module, *, image: bool, text: bool, batch_norm: bool = True) -> None:
    """Put the towers that train into training mode, and what is frozen into eval mode.

    A frozen tower's features must not change from step to step, as dropout or batch statistics would have them.

    Args:
        batch_norm: False leaves BatchNorm's running statistics as they are and normalises by them; its weight and
            bias train with the rest.
    """
    model.train(text)
    cast("nn.Module", model.visual).train(image)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not batch_norm:
            module.eval()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the optimiser gets, by the names of the checkpoint that will be written."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrap(towers: Towers, *, sharded: bool, synced: bool, compiled: bool) -> nn.Module:
    """Return the towers as this world needs them.

    Args:
        sharded: FSDP2, for models that do not fit.
        synced: DDP, which averages gradients while the backward pass runs; False leaves that to the caller.
        compiled: torch.compile, of the image tower and of the text tower's blocks.
    """
    visual = towers.model.get_submodule("visual")
    # FSDP refuses parameters that are laid out channels last.
    visual.to(memory_format=torch.contiguous_format if sharded else towers.format)
    if sharded:
        _shard(towers)
    if compiled:
        # Not the text tower as a whole: the context is cut around its blocks, to a length that changes.
        for name in ("visual", "transformer", "text.transformer"):
            with suppress(AttributeError):
                towers.model.get_submodule(name).compile()
    inside = [p for name, p in towers.model.named_parameters() if not is_outside(name)]
    if not synced or not any(p.requires_grad for p in inside):
        return towers
    from torch.nn.parallel import DistributedDataParallel

    # A parameter that the forward pass does not use would be waited for; `average_gradients` sees to those.
    names = [f"model.{name}" for name, _ in towers.model.named_parameters() if is_outside(name)]
    if not has_batch_norm(towers):
        names += [name for name, _ in towers.named_buffers()]  # masks and means: the same everywhere, always
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(towers, names)  # type: ignore[no-untyped-call]
    device = inside[0].device
    return DistributedDataParallel(
        towers,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _shard(towers: Towers) -> None:
    """Apply FSDP2: each transformer block is a unit, the rest another; what the loss uses stays whole.

    The mesh follows the towers' device; torch's default would follow the machine's accelerator.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = {p for name, p in towers.model.named_parameters() if is_outside(name)}
    mesh = init_device_mesh(towers.mean.device.type, (world(),))
    # bf16 halves what is gathered; gradients are reduced in fp32. BatchNorm wants its weights like its statistics.
    bf16 = mesh.device_type == "cuda" and towers.precision == "bf16" and not has_batch_norm(towers.model)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in towers.model.modules():
        if type(module).__name__ in ("ResidualAttentionBlock", "Block"):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(towers, mesh=mesh, mp_policy=policy, ignored_params=whole, reshard_after_forward=False)


def unsynced(module: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which DDP adds gradients up on each rank and does not average them yet."""
    no_sync = getattr(module, "no_sync", None)
    return cast("AbstractContextManager[object]", no_sync()) if no_sync else nullcontext()


def full_state_dict(
    model: nn.Module, optimiser: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return whole tensors of a sharded model and its optimiser, on the CPU of rank 0 (elsewhere nothing)."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=options)
    state = {} if optimiser is None else get_optimizer_state_dict(model, optimiser, options=options)
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, dict(state)


def load_full_state_dict(
    model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Any], state: dict[str, Any]
) -> None:
    """Give each rank its shards of whole tensors that every rank has read."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, tensors, options=options)
    set_optimizer_state_dict(model, optimiser, state, options=options)


def local_shard(value: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; a whole one as it is."""
    to_local = getattr(value, "to_local", None)
    return cast("Tensor", value if to_local is None else to_local())
