"""How commands declare their options, alone or in groups: a group is a frozen dataclass that a command takes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

_LAST = ("json", "quiet")
"""Options that `--help` lists after a group's others, though its base declares them."""


def opt(default: object, help: str, panel: str | None = None, *names: str, **more: Any) -> Any:
    """Declare an option, as the default of a command's parameter or of a group's field.

    Args:
        default: ... where it must be given.
        panel: the box of --help that lists it.
        names: such as "--output", "-o"; by default made from the parameter's (`dry_run` is --dry-run).
        more: metavar, min, parser …, as for `typer.Option`.
    """
    return _declare(default, {"help": help, "panel": panel, "names": names, "more": more})


def arg(metavar: str, help: str, default: object = ...) -> Any:
    """Declare an argument, as the default of a command's parameter."""
    return _declare(default, {"argument": typer.Argument(metavar=metavar, help=help, show_default=False)})


def setting(group: type, name: str, default: object = ..., panel: str | None = None) -> Any:
    """Declare an option by the metadata of a library's dataclass field: its meaning, limits and panel."""
    (like,) = (like for like in fields(group) if like.name == name)
    metadata = {**like.metadata, "panel": panel or like.metadata["panel"]}
    return _declare(like.default if default is ... else default, metadata)


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function with the options of each group as its own keywords, for typer, which knows no groups.

    An option that the command declares itself as well is left out of the group, whose field keeps its default.
    """
    hints = get_type_hints(command)
    own = inspect.signature(command).parameters
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    members: dict[str, list[str]] = {}
    for name, parameter in own.items():
        if name in groups:
            types = get_type_hints(groups[name])
            declared = [f for f in fields(groups[name]) if f.name not in own and f.metadata["panel"]]
            declared.sort(key=lambda f: f.name in _LAST)
            members[name] = [f.name for f in declared]
            parameters += [_parameter(f.name, types[f.name], f) for f in declared]
        else:
            parameters.append(_parameter(name, hints.get(name, str), parameter.default))

    @wraps(command)
    def flat(**options: object) -> None:
        made = {name: group(**{n: options.pop(n) for n in members[name]}) for name, group in groups.items()}
        command(**made, **options)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


def _declare(default: object, metadata: Mapping[str, Any]) -> Any:
    return field(default=MISSING if default is ... else default, metadata=metadata)


def _parameter(name: str, hint: object, default: object) -> inspect.Parameter:
    if isinstance(default, Field):
        hint = Annotated[hint, default.metadata.get("argument") or _option(name, default.metadata)]
        default = inspect.Parameter.empty if default.default is MISSING else default.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _option(name: str, meta: Mapping[str, Any]) -> Any:
    names = meta.get("names") or (meta.get("option") or f"--{name.replace('_', '-')}",)
    limits = {limit: meta[limit] for limit in ("min", "max") if limit in meta}
    more = {**limits, **meta.get("more", {})}
    return typer.Option(*names, help=meta["help"], rich_help_panel=meta["panel"], **more)
