"""Sets of weights in one file: the words of wrappers come off the names, and one of several sets is chosen.

A training checkpoint may hold the weights twice, as trained and averaged. Which is meant is asked, never guessed:
`FILE#raw`, `FILE#ema`, or the key that the file itself uses.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import CheckpointError, MismatchError

WRAPPERS = frozenset({
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
})  # fmt: skip
"""Words that DDP, torch.compile, FSDP, activation checkpointing and Fabric put anywhere into a name."""
LEADING = ("image_encoder", "model")
"""First words that only say what wrapped the model, whatever follows."""
RAW, AVERAGED = "raw", "ema"

_MODEL = re.compile(
    r"(?:^|\.)(?:visual\.|(?:vision_model|text_model)\.(?:e|post|final|head)|text\.(?:token_e|transformer|positional_e)"
    r"|(?<!embeddings\.)token_embedding\.weight|transformer\.resblocks\.)"
)
"""Where the names of a CLIP begin: what stands before is an attribute of whatever held the model, but for `embeddings`,
which is a part of transformers' text towers."""
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged?|shadow|polyak)(?:[._]|$)", re.IGNORECASE)
_BOOKKEEPING = frozenset(
    {"n_averaged", "initted", "step", "num_updates", "decay", "ema_decay", "global_step"}
)
"""Counters that wrappers (torch's AveragedModel, ema_pytorch, timm's ModelEma) save among the weights."""


@dataclass(slots=True)
class WeightSet:
    """One set of weights, names without the words of wrappers.

    Attributes:
        key: what the file calls it; "" where it has no name for it.
        wrapped: the same tensors with the attribute that held the model still before their names.
        words: the leading words that came off.
        dropped: counters of wrappers, left out.
    """

    key: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    wrapped: dict[str, Tensor] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)
    dropped: list[str] = field(default_factory=list)

    @property
    def is_averaged(self) -> bool:
        """Whether its key says that it is a running average."""
        return bool(_AVERAGED.search(self.key))


def choose_set(where: str, groups: Mapping[str, Mapping[str, Tensor]], choice: str | None) -> WeightSet:
    """Return the set of weights that is meant.

    Args:
        where: the file, for messages.
        groups: tensors as the container groups them, by its own key; the first is the main one.
        choice: "raw", "ema" or a key; None where there is nothing to choose.

    Raises:
        CheckpointError: there are several sets and no choice, or the choice names none of them.
        MismatchError: two names become one.
    """
    sets = [one for key, tensors in groups.items() for one in _split(key, tensors)] or [WeightSet("")]
    main = sets[0]
    # A criterion's or a discriminator's tensors in the same file are not another set of the model's.
    others = [one for one in sets[1:] if not _is_same_model(one.tensors, main.tensors)]
    main.dropped += [".".join(filter(None, (one.key, name))) for one in others for name in one.tensors]
    sets = [one for one in sets if one not in others]
    names = _names(sets)
    if choice is None and len(sets) == 1:
        return main
    shown = " and ".join(f"{name!r}" + f" ({s.key})" * (s.key not in ("", name)) for name, s in names.items())
    if choice is None:
        raise CheckpointError(
            f"{where} holds {len(sets)} sets of weights of one model: {shown}",
            hint=f"say which: {' or '.join(f'{where}#{name}' for name in names)}",
        )
    chosen = names.get(choice) or next((one for one in sets if one.key == choice), None)
    if chosen is None:
        held = f"it holds {shown}" if len(sets) > 1 else "it holds one set of weights"
        hint = "choose one of these" if len(sets) > 1 else f"leave out #{choice}"
        raise CheckpointError(f"{where} has no weights {choice!r}: {held}", hint=hint)
    return chosen


def _names(sets: list[WeightSet]) -> dict[str, WeightSet]:
    """What each set is chosen by: "raw" and "ema" where these words tell them apart, else its own key."""
    kinds = [AVERAGED if one.is_averaged else RAW for one in sets]
    own = [one.key or RAW for one in sets]
    return {kind if kinds.count(kind) == 1 else key: s for kind, key, s in zip(kinds, own, sets, strict=True)}


def _split(key: str, tensors: Mapping[str, Tensor]) -> Iterator[WeightSet]:
    """Take the words off the names; names that would fall together are sets of their own."""
    bare = _without_wrappers(tensors)
    prefixes = {
        name[: match.start() + (match[0][0] == ".")] for name in bare if (match := _MODEL.search(name))
    }
    order = sorted(prefixes, key=lambda prefix: (bool(_AVERAGED.search(prefix)), -len(prefix), prefix))
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in bare.items():
        prefix = next((p for p in order if name.startswith(p)), "") or _leading(name)
        groups.setdefault(prefix, {})[name] = tensor
    sets: list[WeightSet] = []
    for prefix in sorted(groups, key=lambda p: (bool(_AVERAGED.search(p)), -len(groups[p]), p)):
        part = {name.removeprefix(prefix): tensor for name, tensor in groups[prefix].items()}
        main = sets[0].tensors if sets else {}
        if prefix and _AVERAGED.search(prefix) and main:  # LitEma takes the dots out of names
            undotted = {name.replace(".", ""): name for name in main}
            part = {undotted.get(name, name): tensor for name, tensor in part.items()}
        home = next((s for s in sets if not s.tensors.keys() & part.keys()), None)
        if not sets or (home is None and _is_same_model(part, main)):
            home = WeightSet(".".join(filter(None, (key, prefix.rstrip(".")))))
            sets.append(home)
        if home is None:
            name = min(part.keys() & main.keys())
            raise MismatchError(
                f"{prefix + name[:120]!r} and another name both stand for {name[:120]!r}",
                hint="the file holds two models; save the one you want alone",
            )
        home.words.update(filter(None, prefix.split(".")))
        for name, tensor in part.items():
            if name.rpartition(".")[2] in _BOOKKEEPING and tensor.numel <= 1:
                home.dropped.append(prefix + name)
            else:
                home.tensors[name] = home.wrapped[prefix + name] = tensor
    if len(sets) == 1 and not sets[0].is_averaged:
        sets[0].key = key
    yield from sets


def _is_same_model(part: Mapping[str, Tensor], main: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of the same model: they share a quarter of the names (one tower of two does)."""
    return 4 * len(part.keys() & main.keys()) >= len(main)


def _leading(name: str) -> str:
    """The first words of a name that only say what wrapped the model, with the dot behind them."""
    words, count = name.split("."), 0
    while count < len(words) - 1 and (words[count] in LEADING or _AVERAGED.search(words[count])):
        count += 1
    return "".join(f"{word}." for word in words[:count])


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        *words, last = name.split(".")
        short = ".".join([*(word for word in words if word not in WRAPPERS), last])
        if short in bare:
            raise MismatchError(
                f"{origin[short][:120]!r} and {name[:120]!r} both stand for {short[:120]!r}",
                hint="the file holds two models; save the one you want alone",
            )
        bare[short], origin[short] = tensor, name
    return bare
