"""Decide how weights are scored on a split: by which model, with which class names and prompts, and by which head.

The one place that decides it, for every command and for Python. Each checkpoint speaks for itself: what it records of
its model, prompts and class names is used wherever nothing else was given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipmerge.data.classes import plain_name
from clipmerge.data.prompts import DEFAULT, NAMED
from clipmerge.data.prompts import templates as resolve_templates
from clipmerge.data.split import Split
from clipmerge.errors import DataError, ModelError, SelectionError
from clipmerge.model import ModelSpec, resolve_model
from clipmerge.text import and_more
from clipmerge.types import Ints
from clipmerge.weights.labels import names_of
from clipmerge.weights.names import lacks_text, lone_tower
from clipmerge.weights.record import model_record
from clipmerge.weights.weights import Source, Weights, as_checkpoint

__all__ = ["Given", "Origin", "Setup", "as_recorded", "read_head"]

HeadKind = Literal["zero-shot", "trained", "file", "captions"]
Origin = Literal["given", "recorded", "the data's", "default"]

HEAD = "classification_head"


@dataclass(frozen=True)
class Setup:
    """How weights are scored on a split.

    Attributes:
        spec: the model. spec_from: "given", or which checkpoint records it.
        templates, classes: the prompts: templates, and a name for each of the split's classes.
        templates_from, classes_from: where they come from.
        head: what gives logits: "zero-shot" (built from the prompts), "trained" (the weights' own), "file"; "captions"
            where the data have no classes.
        rows: of a trained head with other rows than the split has classes, those for the split's classes.
    """

    spec: ModelSpec
    spec_from: str
    templates: tuple[str, ...]
    templates_from: Origin
    classes: tuple[str, ...]
    classes_from: Origin
    head: HeadKind
    rows: Ints | None = field(default=None, repr=False)

    def exceptions(self) -> dict[str, Any]:
        """Return what a score depends on beside model, templates and the split itself; {} for most."""
        renamed = self.head == "zero-shot" and self.classes_from == "recorded"
        rows = {} if self.rows is None else {"rows": self.rows.tolist()}
        return ({"classes": self.classes} if renamed else {}) | rows

    def says(self) -> str:
        """Say what gives the logits, in a few words."""
        others = {
            "trained": "a trained head",
            "file": "a head from a file",
            "captions": "captions, by retrieval",
        }
        if self.head != "zero-shot":
            return others[self.head]
        count, first = len(self.templates), repr(self.templates[0])
        prompts = f"prompts {first}" if count == 1 else f"{count} prompts such as {first}"
        names = ", class names recorded" if self.classes_from == "recorded" else ""
        return f"{prompts} ({self.templates_from}{names})"

    def entry(self, split: Split) -> dict[str, list[str]]:
        """Return these prompts as a checkpoint records them for such data."""
        entry = {"templates": self.templates, "classes": self.classes, "words": split.words}
        return {key: list(texts) for key, texts in entry.items() if texts}

    def to_json(self) -> dict[str, Any]:
        """Return head and prompts, ready for `json.dumps`."""
        if self.head != "zero-shot":
            return {"head": self.head}
        origins = {"templates_from": self.templates_from, "classes_from": self.classes_from}
        return {"head": self.head, "templates": list(self.templates), **origins}


@dataclass(frozen=True)
class Given:
    """What was given for all weights; None leaves it to them and to the data.

    Attributes:
        model: as `resolve_model` takes it. templates: as `data.prompts.templates` takes them.
        heads: split → a checkpoint whose classification head scores it.
        text_tower: the checkpoint whose text tower is taken by those that have none.
    """

    model: ModelSpec | str | Path | None = None
    templates: str | Path | Sequence[str] | None = None
    heads: Mapping[str, Weights] = field(default_factory=dict)
    text_tower: Weights | None = None

    def complete(self, weights: Weights) -> Weights:
        """Return the weights with the text tower that they lack, where one was given."""
        if self.text_tower is None or not weights.terms or not lacks_text(weights.names):
            return weights
        return weights.completed_from(self.text_tower)

    def spec(self, weights: Iterable[Weights] = ()) -> ModelSpec:
        """Return the model that was given, else the one that all of the weights record."""
        return resolve_model(self.model, *weights)

    def setup(self, weights: Sequence[Weights], name: str, split: Split) -> Setup:
        """Decide how weights are scored on a split, all of them alike.

        Raises:
            ModelError: they are for different models, or have no head and nothing to build one from.
            SelectionError: they record different prompts, and none were given. DataError: there is one class only.
        """
        if split.classes and split.choices < 2:
            raise DataError(
                f"{split.source} has {split.choices or 'no'} class to choose from, so no score can follow",
                hint="name the folder whose folders are the classes; captions are scored by --metric recall@1",
            )
        head: HeadKind = "zero-shot"
        if not split.classes:
            head = "captions"
        elif name in self.heads:
            head = "file"
        elif f"{HEAD}.weight" in weights[0].names:
            head = "trained"
        entries = _entries(weights, split)
        classes, classes_from = _class_names(entries, split)
        templates, templates_from = self._templates(entries, split)
        if head == "zero-shot":
            _refuse_two(classes, f"class names for {name}", "--classnames", "names")
            _refuse_two(templates, f"prompts for {name}", "--templates", "templates")
        needs_text = head in ("zero-shot", "captions")
        if needs_text and any(each.extra.get("without_place") for each in weights[0].checkpoints):
            raise ModelError(f"{weights[0]!r} cannot be scored", hint=weights[0].hint_of_misfit())
        if lone_tower(weights[0].names) == "text":
            raise ModelError(
                f"{weights[0]!r} is a text tower, which no image can be scored by",
                hint="give the whole model, or for its text tower alone: --text-tower with an image encoder",
            )
        if needs_text and lacks_text(weights[0].names) and self.text_tower is None:
            raise ModelError(
                f"{weights[0]!r} has no text tower, which {name} is scored by",
                hint="name a checkpoint that has it, such as the base that this was finetuned from "
                f"(--text-tower CKPT), or give a head (--head {name}=FILE)",
            )
        return Setup(
            self.spec(weights),
            "given" if self.model is not None else _recorder(weights),
            templates[0],
            templates_from,
            classes[0],
            classes_from,
            head,
            None if needs_text else self._rows(weights, name, split, entries),
        )

    def _templates(self, entries: "list[_Entry]", split: Split) -> tuple[list[tuple[str, ...]], Origin]:
        if "templates" in split.given and split.templates:
            return [split.templates], "given"
        if self.templates is not None:
            return [resolve_templates(self.templates)], "given"
        recorded = list(dict.fromkeys(_recorded_templates(entry) for entry, _ in entries))
        if recorded:
            return recorded, "recorded"
        return ([split.templates], "the data's") if split.templates else ([DEFAULT], "default")

    def _rows(
        self, weights: Sequence[Weights], name: str, split: Split, entries: "list[_Entry]"
    ) -> Ints | None:
        """Find the rows of a trained head that are the split's classes; None where it is all of them in order.

        Raises:
            ModelError: it has other classes, or another number of them.
        """
        source, own = self.heads.get(name, weights[0]), name not in self.heads
        count = source.tensor(f"{HEAD}.weight").shape[0]
        orders = {places for entry, places in entries if own and len(entry.get("classes", ())) == count}
        if len(orders) > 1:
            raise ModelError(
                "the checkpoints' heads were trained on classes in different orders",
                hint="a merged head needs one order of classes",
            )
        if orders:
            (order,) = orders
            return None if order == tuple(range(count)) else np.array(order, np.int64)
        trained_on = [entry["classes"] for entry in source.prompts if len(entry.get("classes", ())) == count]
        if trained_on and "classes" not in split.given:
            raise ModelError(
                f"the head of {source!r} was trained on {and_more(trained_on[0], 4)}, "
                f"and {split.source} has {and_more(split.classes, 4)}",
                hint="score it on data of those classes; where only the names differ, give them by --classnames",
            )
        if count != len(split.classes):
            raise ModelError(
                f"the head has {count} classes, {split.source} has {len(split.classes)}",
                hint="score it on the data that the head was trained for",
            )
        return None


def as_recorded(split: Split, weights: Weights) -> Split:
    """Return the split with the prompts and class names that the weights record for its classes; what was given stays.

    Raises:
        SelectionError: the weights record two kinds of prompts for these classes.
    """
    if not split.classes:
        return split
    entries = _entries([weights], split)
    classes, classes_from = _class_names(entries, split)
    templates, templates_from = Given()._templates(entries, split)
    _refuse_two(classes, f"class names for {split.source}", "--classnames", "names")
    _refuse_two(templates, f"prompts for {split.source}", "--templates", "templates")
    if classes_from == "recorded":
        split = replace(split, classes=classes[0], words=split.words or split.classes)
    return replace(split, templates=templates[0]) if templates_from == "recorded" else split


def read_head(source: Source) -> Weights:
    """Open the classification head of a checkpoint, or of a file that is one (the papers' heads: weight and bias).

    Raises:
        ModelError: it has none.
    """
    checkpoint = as_checkpoint(source)
    parts = {name: t for name, t in checkpoint.tensors.items() if name.startswith(f"{HEAD}.")}
    if f"{HEAD}.weight" not in parts:
        raise ModelError(
            f"{checkpoint.path or checkpoint.name} has no classification head",
            hint="a head is a file with weight and bias, or a checkpoint with classification_head.weight",
        )
    return Weights.of(replace(checkpoint, tensors=parts))


def _recorder(weights: Iterable[Weights]) -> str:
    checkpoints = (c for each in weights for c in each.checkpoints if model_record(c) is not None)
    return f"recorded in {names_of([Weights.of(next(checkpoints))])[0]}"


_Entry = tuple[Mapping[str, Any], tuple[int, ...]]
"""What a checkpoint records of its prompts, and for each of the split's classes the place of that class in it."""


def _entries(weights: Iterable[Weights], split: Split) -> list[_Entry]:
    """List what the weights record of prompts for the split's classes."""
    recorded = (entry for each in weights for entry in each.prompts)
    return [(entry, places) for entry in recorded if (places := _places(entry, split))]


def _places(entry: Mapping[str, Any], split: Split) -> tuple[int, ...]:
    """For each of the split's classes find its place among the recorded ones; () where the record is of other classes.

    Classes are the same where the names are, or what the data calls them. Data that only number their classes, as
    many as are recorded, take the recorded names in order. A record without classes is of any data.
    """
    classes = entry.get("classes")
    if classes is None:
        return tuple(range(len(split.classes)))
    only_numbers = not split.words and split.classes == tuple(map(str, range(len(classes))))
    if only_numbers and "classes" not in split.given:
        return tuple(range(len(classes)))
    place: dict[str, int] = {}
    for texts in (classes, entry.get("words", ())):
        for i, text in enumerate(texts):
            if text:
                place.setdefault(plain_name(text), i)
    words = split.words or split.classes
    places = [
        place.get(plain_name(name), place.get(plain_name(word), -1))
        for name, word in zip(split.classes, words, strict=True)
    ]
    return () if -1 in places or len(set(places)) < len(places) else tuple(places)


def _class_names(entries: list[_Entry], split: Split) -> tuple[list[tuple[str, ...]], Origin]:
    own: Origin = "given" if "classes" in split.given else "the data's"
    recorded = [tuple(entry["classes"][i] for i in places) for entry, places in entries if "classes" in entry]
    if own == "given" or not recorded:
        return [split.classes], own
    distinct = list(dict.fromkeys(recorded))
    return distinct, own if distinct == [split.classes] else "recorded"


def _recorded_templates(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return recorded templates; files of old may name a list of open_clip's."""
    texts = entry["templates"]
    return resolve_templates(texts[0] if texts[0] in NAMED else texts)


def _refuse_two(choices: list[tuple[str, ...]], what: str, option: str, word: str) -> None:
    if len(choices) > 1:
        one, other = choices[:2]
        first, second = (next((t for t in a if t not in b), a[0]) for a, b in ((one, other), (other, one)))
        raise SelectionError(
            f"the checkpoints record different {what}: {first!r} and {second!r} among them",
            hint=f"one head needs one choice: give the {word} with {option}",
        )
