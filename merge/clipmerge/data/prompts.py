"""Class names × templates → prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipmerge.errors import DataError

if TYPE_CHECKING:
    from clipmerge.data.split import Split

DEFAULT = ("a photo of a {}.",)

DEFAULTS: Mapping[str, tuple[str, ...]] = {"digits": ('a photo of the number: "{}".',)}
"""Source → templates. Source: CLIP's own prompts for MNIST, arXiv 2103.00020."""

CONTEXTS = (
    "photo", "painting", "sketch", "drawing", "cartoon", "sculpture", "toy", "blurry photo", "dark photo",
    "close-up photo",
)  # fmt: skip
"""Contexts of CAR-FT, in the order of the columns of its context head."""


def templates(
    choice: str | Path | Sequence[str] | None = None, split: "Split | None" = None
) -> tuple[str, ...]:
    """Templates that each hold `{}` once or more.

    Args:
        choice: "openai" (ImageNet's 80), "simple" (7), a file (one a line, or a JSON list), a text with
            `{}`, or several texts. None: the split's own, else a default for its source, else "a photo of
            a {}.".

    Raises:
        DataError: no such file, or a template without `{}`.
    """
    if choice is None:
        own = None if split is None else split.templates
        source = "" if split is None else split.source.partition("@")[0].partition("#")[0]
        return own or DEFAULTS.get(source, DEFAULT)
    if isinstance(choice, str) and choice in ("openai", "simple"):
        return _open_clips(choice)
    if isinstance(choice, str | Path):
        texts = (str(choice),) if "{" in str(choice) else _from_file(Path(choice))
        return checked(texts, str(choice))
    return checked(tuple(choice), "templates")


def checked(texts: Sequence[str], source: str) -> tuple[str, ...]:
    """The templates with CLIP_benchmark's `{c}` written as `{}`.

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
    """[class][template]: every template filled with every class name."""
    return [[template.replace("{}", name) for template in templates] for name in classes]


def context_templates(contexts: Sequence[str] = CONTEXTS) -> tuple[str, ...]:
    """ "sketch" → "a sketch of a {}."; a context that holds `{}` stays as it is.

    Source: Mao et al. 2022, arXiv 2211.16175, "a [CONTEXT] of [CLASS]".
    """
    article = {True: "an", False: "a"}
    return checked(
        [c if "{" in c else f"{article[c[:1].lower() in tuple('aeiou')]} {c} of a {{}}." for c in contexts],
        "contexts",
    )


def _open_clips(name: str) -> tuple[str, ...]:
    import open_clip

    found = open_clip.OPENAI_IMAGENET_TEMPLATES if name == "openai" else open_clip.SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in found)


def _from_file(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"templates cannot be read from {path}: {reason}", hint=_HINT) from error
    if text.lstrip().startswith("["):
        try:
            return tuple(map(str, json.loads(text)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}", hint=_HINT) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
