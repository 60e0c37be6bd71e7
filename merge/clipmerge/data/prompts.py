"""Fill prompt templates with class names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipmerge.data.split import Split
from clipmerge.data.text_lists import read_list
from clipmerge.errors import DataError

__all__ = ["CONTEXTS", "check_templates", "context_templates", "prompts", "templates"]

DEFAULT = ("a photo of a {}.",)

DEFAULTS: Mapping[str, tuple[str, ...]] = {"digits": ('a photo of the number: "{}".',)}
"""Source → templates. Source: CLIP's own prompts for MNIST, arXiv 2103.00020."""

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
        choice: "openai" (ImageNet's 80), "simple" (7), a file (one a line, or a JSON list), a text with
            `{}`, or several texts. None: the split's own, else a default for its source, else "a photo of
            a {}.".

    Raises:
        DataError: no such file, or a template without `{}`.
    """
    if choice is None:
        if split is None:
            return DEFAULT
        return split.templates or DEFAULTS.get(re.split("[@#]", split.source)[0], DEFAULT)
    if choice in ("openai", "simple"):
        import open_clip

        filled = (
            open_clip.OPENAI_IMAGENET_TEMPLATES if choice == "openai" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
        return tuple(template("{}") for template in filled)
    if isinstance(choice, str | Path):
        texts = (
            (str(choice),)
            if "{" in str(choice)
            else tuple(map(str, read_list(Path(choice), "templates", _HINT)))
        )
        return check_templates(texts, str(choice))
    return check_templates(tuple(choice), "templates")


def check_templates(texts: Sequence[str], source: str) -> tuple[str, ...]:
    """Return templates with CLIP_benchmark's `{c}` written as `{}`.

    Raises:
        DataError: there are none, or one has no place for the class name.
    """
    out = tuple(text.replace("{c}", "{}") for text in texts)
    wrong = [text for text in out if "{}" not in text or "{" in text.replace("{}", "")]
    if wrong or not out:
        problem = f"has no {{}} for the class name: {wrong[0]!r}" if wrong else "is empty"
        raise DataError(f"a template in {source} {problem}" if wrong else f"{source} {problem}", hint=_HINT)
    return out


_HINT = 'write templates as "a photo of a {}."; or openai, simple, or a file with one a line'


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return [class][template]: every template filled with every class name."""
    return [[template.replace("{}", name) for template in templates] for name in classes]


def context_templates(contexts: Sequence[str] = CONTEXTS) -> tuple[str, ...]:
    """Turn "sketch" into "a sketch of a {}."; a context that holds `{}` stays as it is.

    Source: Mao et al. 2022, arXiv 2211.16175, "a [CONTEXT] of [CLASS]".
    """
    article = {True: "an", False: "a"}
    return check_templates(
        [c if "{" in c else f"{article[c[:1].lower() in tuple('aeiou')]} {c} of a {{}}." for c in contexts],
        "contexts",
    )
