"""Zero-shot heads: prompts through the text tower at the least exact cost, kept by what they are made of."""

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["encode_text", "text_lengths"]


class _TextSide(nn.Module):
    """Lets `functional_call` reach `encode_text` of a model, whose `forward` is about images as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, normalize: bool) -> Tensor:
        return cast("Tensor", self.model.encode_text(tokens, normalize=normalize))  # type: ignore[operator]


def encode_text(
    model: nn.Module,
    tokens: "Int[Tensor, 'prompts context']",
    normalize: bool = True,
    *,
    length: int | None = None,
) -> "Float[Tensor, 'prompts d']":
    """What `model.encode_text` returns, with the context cut at the batch's last end-of-text token.

    A causal tower that reads its feature at the end of the text never looks at what follows, so the cut
    changes nothing but the cost. Gradients are those of the plain call. Towers that look further (not causal,
    with a class token, pooled at the last position, Hugging Face's) are called plainly.

    Args:
        length: the cut, where the caller knows it: then a GPU is not waited for.
    """
    names = _cut_names(model)
    if names is None:
        return cast("Tensor", model.encode_text(tokens, normalize=normalize))  # type: ignore[operator]
    if length is None:
        length = int(_ends(model, tokens).max()) + 1
    if length >= tokens.shape[1]:
        return cast("Tensor", model.encode_text(tokens, normalize=normalize))  # type: ignore[operator]
    positions, mask = names
    cut = {
        f"model.{positions}": model.get_parameter(positions)[:length],
        f"model.{mask}": model.get_buffer(mask)[:length, :length],
    }
    return cast("Tensor", functional_call(_TextSide(model), cut, (tokens[:, :length], normalize)))


def text_lengths(model: nn.Module, tokens: "Int[Tensor, 'prompts context']") -> "Int[Tensor, ' prompts']":
    """How many tokens of each prompt decide its feature: the whole context where it cannot be cut."""
    if _cut_names(model) is None:
        return torch.full((len(tokens),), tokens.shape[1])
    return _ends(model, tokens) + 1


def _cut_names(model: nn.Module) -> tuple[str, str] | None:
    """Names of the positional embedding and the causal mask, or None where the context must stay whole."""
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer

    text: Any = getattr(model, "text", model)
    if isinstance(model, CLIP):
        pool, prefix = text.text_pool_type, ""
    elif isinstance(text, TextTransformer) and text.cls_emb is None and not text.use_pad_mask:
        pool, prefix = text.pool_type, "text."
    else:
        return None
    if text.attn_mask is None or pool not in ("argmax", "eos"):
        return None
    return f"{prefix}positional_embedding", f"{prefix}attn_mask"


def _ends(model: nn.Module, tokens: "Int[Tensor, 'prompts context']") -> "Int[Tensor, ' prompts']":
    """Where each prompt's feature is read: the same rule as open_clip's `text_global_pool`."""
    text: Any = getattr(model, "text", None)
    found: Any = model
    pool, end = (found.text_pool_type, found.text_eos_id) if text is None else (text.pool_type, text.eos_id)
    return tokens.argmax(dim=-1) if pool == "argmax" else (tokens == end).int().argmax(dim=-1)
