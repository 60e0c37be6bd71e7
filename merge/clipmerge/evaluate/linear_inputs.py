"""What the linear layers of a model see: XᵀX of the inputs of each, whichever way the model calls it."""

from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clipmerge.weights.names import is_transposed

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class LinearInputs(TorchFunctionMode):
    """Add up XᵀX of a model's linear layers while the block runs.

    A layer is a parameter with two dimensions that inputs are multiplied by: of `nn.Linear`, in attention (whose
    projections are plain parameters), and open_clip's `x @ proj`.

    Args:
        among: the names of the parameters that count; None: all.

    Attributes:
        sums: name → (in, in), fp32, over all inputs that it has had.
    """

    def __init__(self, module: nn.Module, among: Collection[str] | None = None) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2}
        self._names = {id(p): name for name, p in matrices.items() if among is None or name in among}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, keywords)
        if func is F.linear or func in _PRODUCTS:
            inputs, weight = args[:2]
            name = self._names.get(id(weight))
            if name is not None and is_transposed(name) == (func is not F.linear):
                rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
                square = rows.T @ rows
                self.sums[name] = self.sums[name] + square if name in self.sums else square
        return func(*args, **keywords)

    def _attention(self, func: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Compute attention of a sequence with itself by products that are seen; any other as torch does."""
        given = signature(func).bind(*args, **keywords).arguments
        query, mask, heads = given["query"], given.get("attn_mask"), given["num_heads"]
        unusual = (
            "bias_k",
            "bias_v",
            "add_zero_attn",
            "key_padding_mask",
            "use_separate_proj_weight",
            "training",
        )
        alone = given["key"] is query and given["value"] is query and query.ndim == 3
        if not alone or any(given.get(name) is not None and given.get(name) is not False for name in unusual):
            return func(*args, **keywords)
        length, batch, width = query.shape
        with self:
            projected = F.linear(query, given["in_proj_weight"], given["in_proj_bias"])
            split = (length, batch, 3, heads, width // heads)
            q, k, v = projected.view(split).permute(2, 1, 3, 0, 4)  # each (batch, heads, length, width)
            if mask is not None and mask.ndim == 3:
                mask = mask.view(batch, heads, length, length)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            joined = attended.permute(2, 0, 1, 3).reshape(length, batch, width)
            return F.linear(joined, given["out_proj_weight"], given["out_proj_bias"]), None
