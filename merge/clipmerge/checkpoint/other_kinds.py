"""Files that look like checkpoints and are none: recognised by names, shapes and dtypes, refused by what they are."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import CheckpointError
from clipmerge.text import and_more

_KINDS = (
    (r"\.?(?:lora_|hada_w|lokr_w|ia3_|vera_|oft_|adalora_|prompt_embeddings|prompt_encoder)", "an adapter",
     "merge it into its base with the library that made it (peft: merge_and_unload), and give the whole model"),
    (r"(?:^|\.)(?:exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq)$", "an optimiser's state",
     "give the file with the weights, which usually lies beside it"),
    (r"\.(?:qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\.\w+|(?:weight|input)_scale(?:_inv)?|weight_zero_point"
     r"|scale_(?:weight|input)|W_q|zero_point|weight\._data|weight\._scale|weight_packed)$|^scaled_fp8$"
     r"|\.weight\.(?:absmax|quant_map)$", "quantised weights",
     "load it with the library that quantised it, and save it in a float dtype; integers cannot be averaged"),
    (r"\.(?:weight|bias)_mask$", "weights that are still being pruned",
     "apply the masks (torch.nn.utils.prune.remove) and save it again; a mean of masks prunes nothing"),
    (r"(?:^|\.)_?flat_param(?:_\d+)?$", "the flattened parameters of one FSDP process",
     "save the model with FSDP's full state dict, or give the distributed checkpoint's folder"),
)  # fmt: skip
"""Names of tensors that no model has: what a file of them holds, and what to do."""
_PARAMETER = re.compile(r"(?:weight|bias|proj|projection|embedding|scale)$")
_FEW, _RANDOM = 8, 1 << 16
"""A file of so many tensors is more than a head; no state of a random number generator has so many bytes."""


def refuse_other_kinds(path: Path, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Refuse a file that does not hold a model's numbers, from its names, shapes and dtypes.

    Args:
        saved: plain values that stood beside the weights.

    Raises:
        CheckpointError: says what the file is, and what to give instead.
    """
    for pattern, kind, hint in _KINDS:
        names = sorted(name for name in tensors if re.search(pattern, name))
        if names:
            shown = and_more([repr(name[:120]) for name in names])
            raise CheckpointError(f"{path} holds {kind}, not a model's weights: {shown}", hint=hint)
    whole = sorted(n for n, t in tensors.items() if n.endswith(".weight") and t.dtype in ("I8", "U8"))
    if whole:
        hint = "save it in a float dtype; integers cannot be averaged"
        raise CheckpointError(
            f"{path} holds quantised weights: {whole[0][:120]!r} is {tensors[whole[0]].dtype}", hint=hint
        )
    if tensors and all(t.dtype == "U8" and len(t.shape) == 1 and t.numel < _RANDOM for t in tensors.values()):
        hint = "give the file with the weights, which usually lies beside it"
        raise CheckpointError(
            f"{path} holds bytes only (random number generators?), no model's weights", hint=hint
        )
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_float}
    empty = sorted(name for name, tensor in floats.items() if not tensor.numel and _PARAMETER.search(name))
    single = [name for name, tensor in floats.items() if tensor.numel <= 1]
    if empty or (len(floats) >= _FEW and 2 * len(single) > len(floats)):
        name = empty[0] if empty else sorted(single)[0]
        hint = "save the whole model's state_dict, gathered from all processes"
        if "ds_version" in saved or "model_states" in path.name:
            hint = "DeepSpeed ZeRO-3 keeps them elsewhere: run zero_to_fp32.py in its folder, and give what it writes"
        what = f"tensor {name[:120]!r} has shape {list(floats[name].shape)}"
        raise CheckpointError(f"{path} holds placeholders without their numbers: {what}", hint=hint)
