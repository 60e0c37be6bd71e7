"""Zero-shot heads: prompts through the text tower at the least exact cost, kept by what they are made of."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clipmerge.checkpoint.output import whole_file
from clipmerge.data.prompts import prompts
from clipmerge.types import Progress
from clipmerge.weights.names import tower_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["encode_prompts", "encode_text", "text_digest", "text_lengths", "zero_shot_head"]


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
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
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


@torch.no_grad()
def encode_prompts(
    model: nn.Module,
    tokens: "Int[Tensor, 'prompts context']",
    *,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> "Float[Tensor, 'prompts d']":
    """Normalised features of prompts, in their order: distinct ones once, in groups of similar length."""
    distinct, places = torch.unique(tokens, dim=0, return_inverse=True)
    device = next(model.parameters()).device
    lengths = text_lengths(model, distinct).cpu()
    order = torch.argsort(lengths, stable=True)
    found: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = int(lengths[rows[-1]])
        found.append(encode_text(model, distinct[rows].to(device), length=longest))
        if on_progress:
            on_progress("encoding prompts", min(start + batch_size, len(order)), len(order))
    features = torch.empty_like(torch.cat(found))
    features[order.to(device)] = torch.cat(found)
    return features[places.to(device)]


def zero_shot_head(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    cache: Path | None = None,
    digest: str | None = None,
    on_progress: Progress | None = None,
) -> "Float[Tensor, 'classes d']":
    """One normalised row for each class; logits are exp(logit_scale) · normalised image features · headᵀ.

    Each prompt's feature is normalised, averaged over the templates, and normalised again.

    Args:
        cache: a folder that keeps heads by what they are made of; None keeps nothing.
        digest: `text_digest(model)`, where the caller knows it.

    Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4.
    """
    device = next(model.parameters()).device
    names, texts = tuple(classes), tuple(templates)
    path = None
    if cache is not None:
        key = _head_key(model, tokenizer, names, texts, digest or text_digest(model))
        path = cache / "heads" / f"{key}.npy"
        kept = _kept(path, len(names))
        if kept is not None:
            return kept.to(device)
    features = encode_prompts(model, _tokens(tokenizer, names, texts), on_progress=on_progress).float()
    head = F.normalize(features.view(len(names), len(texts), -1).mean(dim=1), dim=-1)
    if path is not None:
        with whole_file(path, parents=True) as sibling, sibling.open("wb") as file:
            np.save(file, head.cpu().numpy(), allow_pickle=False)
    return head


def text_digest(model: nn.Module) -> str:
    """A digest of the text tower's weights: equal towers, equal digests."""
    hasher = blake3(b"clipmerge text tower 1", max_threads=blake3.AUTO)
    for name, tensor in sorted(model.state_dict().items()):
        if tower_of(name) == "text":
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


@lru_cache(maxsize=8)
def _tokens(
    tokenizer: Callable[[list[str]], Tensor], classes: tuple[str, ...], templates: tuple[str, ...]
) -> Tensor:
    """Tokens of every class's prompts, class by class. Tokenizing 80,000 prompts costs seconds, so once."""
    texts = [text for row in prompts(classes, templates) for text in row]
    return tokenizer(texts).to(torch.int32)


def _head_key(
    model: nn.Module, tokenizer: Any, classes: tuple[str, ...], templates: tuple[str, ...], digest: str
) -> str:
    """What a head is made of: tower (weights, activation, attention heads), tokenizer, names, templates."""
    text: Any = getattr(model, "text", None) or cast("Any", model).transformer
    attention = [m.num_heads for m in text.modules() if isinstance(m, nn.MultiheadAttention)]
    inner = getattr(tokenizer, "tokenizer", None)
    read_by = [type(tokenizer).__qualname__, getattr(inner, "name_or_path", None), _context(tokenizer)]
    parts = [digest, repr(text), attention, read_by, classes, templates]
    return blake3(json.dumps(parts).encode()).hexdigest()


def _context(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "context_length", None)


def _kept(path: Path, classes: int) -> Tensor | None:
    """A head from the cache, None where there is none or it is damaged."""
    try:
        head = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if head.dtype != np.float32 or head.shape[:1] != (classes,) or not np.isfinite(head).all():
        return None
    return torch.from_numpy(head)
