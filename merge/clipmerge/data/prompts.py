"""Read prompt templates, and fill them with class names."""

import json
import re
from collections.abc import Sequence
from math import lcm
from pathlib import Path
from typing import Any

from clipmerge.data.split import Split
from clipmerge.errors import DataError

__all__ = [
    "CONTEXTS",
    "check_templates",
    "class_prompts",
    "context_templates",
    "prompts",
    "read_list",
    "recorded_prompts",
    "templates",
]

DEFAULT = ("a photo of a {}.",)
NAMED = ("openai", "simple")
"""Lists of templates that open_clip has."""

CONTEXTS = (
    "photo", "painting", "sketch", "drawing", "cartoon", "sculpture", "toy", "blurry photo", "dark photo",
    "close-up photo",
)  # fmt: skip
"""Contexts of CAR-FT, in the order of the columns of its context head."""


def templates(
    choice: str | Path | Sequence[str] | None = None, split: Split | None = None
) -> tuple[str, ...]:
    """Return templates that each hold `{}` once or more.

    Args:
        choice: "openai" (ImageNet's 80), "simple" (7), a file (one per line, or a JSON list), a text with
            `{}`, or several texts. None: the split's own, else "a photo of a {}.".

    Raises:
        DataError: no such file, or a template without `{}`.
    """
    if choice is None:
        return (split and split.templates) or DEFAULT
    if choice in NAMED:
        import open_clip

        openai, simple = open_clip.OPENAI_IMAGENET_TEMPLATES, open_clip.SIMPLE_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in (openai if choice == "openai" else simple))
    if not isinstance(choice, str | Path):
        return check_templates(choice, "templates")
    if "{" in str(choice):
        return check_templates((str(choice),), str(choice))
    return check_templates(read_list(Path(choice), "templates", _HINT), str(choice))


def check_templates(texts: Sequence[str], source: str) -> tuple[str, ...]:
    """Return templates with CLIP_benchmark's `{c}` written as `{}`.

    Raises:
        DataError: there are none, or one has no place for the class name.
    """
    out = tuple(str(text).replace("{c}", "{}") for text in texts)
    wrong = [text for text in out if "{}" not in text or "{" in text.replace("{}", "")]
    if wrong:
        raise DataError(f"a template in {source} has no {{}} for the class name: {wrong[0]!r}", hint=_HINT)
    if not out:
        raise DataError(f"{source} is empty", hint=_HINT)
    return out


_HINT = 'write templates as "a photo of a {}."; or openai, simple, or a file with one per line'


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return [class][template]: every template filled with every class name."""
    return [[template.replace("{}", name) for template in templates] for name in classes]


def class_prompts(split: Split, choice: str | Path | Sequence[str] | None = None) -> list[list[str]]:
    """Return [class][template] for a split's classes.

    Of joined sets each class has its own set's templates, each as often as makes their numbers equal: that changes
    neither a class's mean over them nor how often each is drawn.
    """
    if choice is not None or not split.class_templates:
        return prompts(split.classes, templates(choice, split))
    count = lcm(*map(len, split.class_templates))
    rows = zip(split.classes, split.class_templates, strict=True)
    return [prompts([name], own)[0] * (count // len(own)) for name, own in rows]


def recorded_prompts(
    split: Split, choice: str | Path | Sequence[str] | None = None
) -> list[dict[str, list[str]]]:
    """Return what a checkpoint that was finetuned on these images records: `weights.record.prompts_of` reads it."""
    if split.parts:
        return [entry for part in split.parts for entry in recorded_prompts(part, choice)]
    if not split.classes:
        return []
    entry = {"templates": templates(choice, split), "classes": split.classes, "words": split.words}
    return [{key: list(texts) for key, texts in entry.items() if texts}]


def context_templates(contexts: Sequence[str] = CONTEXTS) -> tuple[str, ...]:
    """Turn "sketch" into "a sketch of a {}."; a context that holds `{}` stays as it is.

    Source: Mao et al. 2022, arXiv 2211.16175, "a [CONTEXT] of [CLASS]".
    """
    articles = ["an" if context[:1].lower() in tuple("aeiou") else "a" for context in contexts]
    filled = (c if "{" in c else f"{a} {c} of a {{}}." for a, c in zip(articles, contexts, strict=True))
    return check_templates(tuple(filled), "contexts")


def read_list(path: Path, what: str, hint: str, *, by_line: bool = False) -> Any:
    """Return the lines of a text file, or what a JSON file holds.

    Args:
        by_line: a line's number means something, so that no line between others may be empty.

    Raises:
        DataError: it cannot be read, begins like JSON and is none, or has an empty line where none may be.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{what} cannot be read from {path}: {reason}", hint=hint) from error
    if re.match(r'\s*(\[|\{\s*")', text):  # a template may begin with "{}"
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}", hint=hint) from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if by_line and "" in lines:
        raise DataError(
            f"{path}: line {lines.index('') + 1} is empty, and a line's place is its label", hint=hint
        )
    return tuple(filter(None, lines))
