"""Build zero-shot heads, and logits from them.

Each distinct prompt is encoded once, without its padding, which is exact (README.md says why); heads are cached on
disk by a digest of everything that they are built from. Scoring, learned soups and finetuning all build theirs here.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clipmerge import distributed
from clipmerge.checkpoint.output import whole_file
from clipmerge.data.prompts import prompts
from clipmerge.types import Progress
from clipmerge.weights.names import tower_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "average_templates",
    "class_logits",
    "encode_prompts",
    "encode_text",
    "evaluating",
    "text_digest",
    "text_lengths",
    "zero_shot_head",
]

Encode = Callable[[Tensor, int], Tensor]
"""(tokens on the device, length of the longest) -> unit features: how a caller runs a wrapped text tower."""

_CPU_BATCH = 256
_GPU_BATCH, _GPU_TOKENS = 4096, 40_960
"""Prompts, and tokens with padding, that fill a GPU for long enough to hide the launches of a text tower."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode while the block runs, and each of its parts back to the mode it had.

    Features that are kept must not follow dropout, stochastic depth or the statistics of a batch.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class _TextSide(nn.Module):
    """Let `functional_call` reach `encode_text` of a model, whose `forward` is about images as well."""

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
    """Encode prompts as `model.encode_text` does, with the context cut at the batch's last end-of-text token.

    A causal tower that reads its feature at the end of the text never looks at what follows, so the cut
    changes nothing but the cost. Gradients are those of the plain call. Towers that look further (not causal,
    with a class token, pooled at the last position, Hugging Face's) are called plainly.

    Args:
        length: the longest prompt's tokens, where the caller knows it: then a GPU is not waited for.
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
    """Count the tokens of each prompt that decide its feature: the whole context where it cannot be cut."""
    if _cut_names(model) is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return _ends(model, tokens) + 1


def _cut_names(model: nn.Module) -> tuple[str, str] | None:
    """Name the positional embedding and the causal mask; None where the context must stay whole."""
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
    """Find where each prompt's feature is read, by the rule of open_clip's `text_global_pool`."""
    text: Any = getattr(model, "text", None)
    clip: Any = model
    pool, end = (clip.text_pool_type, clip.text_eos_id) if text is None else (text.pool_type, text.eos_id)
    return tokens.argmax(dim=-1) if pool == "argmax" else (tokens == end).int().argmax(dim=-1)


def encode_prompts(
    model: nn.Module,
    tokens: "Int[Tensor, 'prompts context']",
    *,
    batch_size: int | None = None,
    encode: Encode | None = None,
    on_progress: Progress | None = None,
) -> "Float[Tensor, 'prompts d']":
    """Encode prompts to unit features, in their order: distinct ones once, in batches of similar length.

    Args:
        batch_size: prompts at a time, by default what suits the device.
        encode: what runs a batch in place of `encode_text(model, …)`, for towers that are wrapped (DDP, FSDP).
    """
    distinct, places = torch.unique(tokens, dim=0, return_inverse=True)
    with evaluating(model):
        features = _encode_distinct(model, distinct, batch_size, encode, on_progress)
    return features[places.to(features.device)]


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
    """Build one unit row for each class; `class_logits` turns image features into logits with it.

    Args:
        cache: a folder that keeps heads by what they are made of; None keeps nothing.
        digest: `text_digest` of the model's tensors, where the caller knows it.

    Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4.
    """
    device = next(model.parameters()).device
    names, texts = tuple(classes), tuple(templates)
    path = None
    if cache is not None:
        key = _head_key(model, tokenizer, names, texts, digest or text_digest(model.state_dict()))
        path = cache / "heads" / f"{key}.npy"
        cached = _cached_head(path, len(names))
        if not distributed.any_rank(
            cached is None
        ):  # on machines with caches of their own, all take part or none
            return cast("Tensor", cached).to(device)
    distinct, places = _distinct_tokens(tokenizer, names, texts)
    with evaluating(model):
        features = _encode_distinct(model, distinct, None, None, on_progress)[places.to(device)]
    head = average_templates(features, len(names))
    if path is not None and (distributed.local_rank() or 0) == 0:
        with whole_file(path, parents=True) as sibling, sibling.open("wb") as file:
            np.save(file, head.cpu().numpy(), allow_pickle=False)
    return head


def average_templates(features: "Float[Tensor, 'prompts d']", classes: int) -> "Float[Tensor, 'classes d']":
    """Average each class's unit prompt features over its templates, and make the mean a unit vector again.

    Args:
        features: class by class, each with all its templates.
    """
    return F.normalize(features.float().view(classes, -1, features.shape[-1]).mean(dim=1), dim=-1)


def class_logits(
    model: nn.Module,
    features: "Float[Tensor, 'batch d']",
    head: Tensor | nn.Module | None,
    rows: "Int[Tensor, ' classes'] | None" = None,
) -> "Float[Tensor, 'batch classes']":
    """Compute logits of unit image features.

    Args:
        head: a zero-shot head, whose logits are exp(logit_scale) · features · headᵀ, plus SigLIP's logit_bias where the
            model has one; or a trained one; None: the model's own trained head.
        rows: which of a trained head's classes, in this order; None takes all.
    """
    clip: Any = model
    trained = getattr(model, "classification_head", None) if head is None else head
    if isinstance(trained, nn.Module):
        scores: Tensor = trained(features)
        return scores if rows is None else scores[:, rows]
    if trained is None:
        raise ValueError("a model without a trained head needs a zero-shot head")
    logits: Tensor = F.linear(features, trained) * clip.logit_scale.exp()
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias


def text_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest those of a model's tensors that are its text tower: equal towers, equal digests."""
    tensors = {n: t.detach() for n, t in sorted(tensors.items()) if tower_of(n) == "text"}
    pieces: Iterable[Tensor] = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values())
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        pieces = list(pieces)
        whole = torch.cat(pieces).cpu()  # one copy from the device, not one for each tensor
        pieces = torch.split(whole, [len(piece) for piece in pieces])
    hasher = blake3(b"clipmerge text tower 1", max_threads=blake3.AUTO)
    for (name, tensor), piece in zip(tensors.items(), pieces, strict=True):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(piece.numpy().data)
    return hasher.hexdigest()


@torch.no_grad()
def _encode_distinct(
    model: nn.Module,
    tokens: Tensor,
    batch_size: int | None,
    encode: Encode | None,
    on_progress: Progress | None,
) -> Tensor:
    """Encode prompts to unit features in their order, shortest first, so that a batch holds little padding.

    Under torchrun each process encodes a share and gets all; all of them call it.
    """
    device, ranks = next(model.parameters()).device, distributed.world()
    lengths = text_lengths(model, tokens).cpu()
    order = torch.argsort(lengths, stable=True)
    batches: list[Tensor] = []
    start = 0
    while start < len(order):
        size = batch_size or _prompts_at_once(lengths[order[start:]], device)
        rows = order[start : start + size * ranks]
        # Each process takes every so-many-th prompt, all equally many: they call a tower with the same shapes.
        own = torch.cat([rows, rows[:1].expand(-len(rows) % ranks)])[distributed.rank() :: ranks]
        batch, longest = tokens[own.to(tokens.device)].to(device), int(lengths[rows[-1]])
        features = encode_text(model, batch, length=longest) if encode is None else encode(batch, longest)
        shares = torch.split(distributed.gather(features), len(own))
        batches.append(torch.stack(shares, dim=1).flatten(0, 1)[: len(rows)])
        start += len(rows)
        if on_progress:
            on_progress("encoding prompts", start, len(order))
    encoded = torch.cat(batches)
    features = torch.empty_like(encoded)
    features[order.to(device)] = encoded
    return features


def _prompts_at_once(lengths: Tensor, device: torch.device) -> int:
    """How many of the prompts that are left, shortest first, make the next batch."""
    if device.type == "cpu":
        return _CPU_BATCH
    longest = int(lengths[min(_GPU_BATCH, len(lengths)) - 1])
    return max(_CPU_BATCH, min(_GPU_BATCH, _GPU_TOKENS // longest))


@lru_cache(maxsize=8)
def _distinct_tokens(
    tokenizer: Callable[[list[str]], Tensor], classes: tuple[str, ...], templates: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Tokenize every class's prompts, class by class: the distinct rows, and where each prompt's row stands.

    ImageNet's 80,000 prompts take seconds, and are the same for every model with this tokenizer.
    """
    texts = [text for row in prompts(classes, templates) for text in row]
    distinct, places = torch.unique(tokenizer(texts).to(torch.int32), dim=0, return_inverse=True)
    return distinct, places


def _head_key(
    model: nn.Module, tokenizer: Any, classes: tuple[str, ...], templates: tuple[str, ...], digest: str
) -> str:
    """Digest what a head is made of: tower (weights, activation, attention heads), tokenizer, names, templates."""
    text: Any = getattr(model, "text", None) or cast("Any", model).transformer
    attention = [m.num_heads for m in text.modules() if isinstance(m, nn.MultiheadAttention)]
    inner = getattr(tokenizer, "tokenizer", None)
    context = getattr(tokenizer, "context_length", None)
    read_by = [type(tokenizer).__qualname__, getattr(inner, "name_or_path", None), context]
    parts = [digest, repr(text), attention, read_by, classes, templates]
    return blake3(json.dumps(parts).encode()).hexdigest()


def _cached_head(path: Path, classes: int) -> Tensor | None:
    """Read a head from the cache; None where there is none or it is damaged."""
    try:
        head = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if head.dtype != np.float32 or head.shape[:1] != (classes,) or not np.isfinite(head).all():
        return None
    return torch.from_numpy(head)
