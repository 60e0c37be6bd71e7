"""How commands declare their options, alone or in groups: a group is a frozen dataclass that a command takes."""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import partial, wraps
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from clipmerge.text import did_you_mean

_LAST = ("json", "quiet")
"""Options that `--help` lists after a group's others, though its base declares them."""

_given: ContextVar[Mapping[str, str]] = ContextVar("given")
"""Parameter → option, of those that were typed for the command that runs."""


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
    def flat(context: typer.Context, **options: object) -> None:
        declared = {p.name: [*p.opts, *p.secondary_opts][0] for p in context.command.params if p.name}
        sources = {name: context.get_parameter_source(name) for name in declared}
        _given.set(
            {n: declared[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"}
        )
        made = {name: group(**{n: options.pop(n) for n in members[name]}) for name, group in groups.items()}
        command(**made, **options)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    flat.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return flat


def refuse_unused(why: str, *what: str | type, but: Collection[str] = ()) -> None:
    """Refuse options that were typed and have no effect beside the others.

    Args:
        why: "without --greedy".
        what: names of parameters, or groups for all of their fields except `but`.
    """
    for each in what:
        for name in (each,) if isinstance(each, str) else [f.name for f in fields(each)]:
            if name in _given.get() and name not in but:
                raise typer.BadParameter(f"has no effect {why}", param_hint=_given.get()[name])


def _declare(default: object, metadata: Mapping[str, Any]) -> Any:
    return field(default=MISSING if default is ... else default, metadata=metadata)


def _parameter(name: str, hint: object, default: object) -> inspect.Parameter:
    if isinstance(default, Field):
        option = default.metadata.get("argument") or _option(name, default.metadata, _choices(hint))
        hint = Annotated[hint, option]
        default = inspect.Parameter.empty if default.default is MISSING else default.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _choices(hint: object) -> tuple[str, ...]:
    """Return what a Literal, alone or beside None, may be."""
    literal = next((each for each in (hint, *get_args(hint)) if get_origin(each) is Literal), None)
    return get_args(literal)


def _option(name: str, meta: Mapping[str, Any], choices: tuple[str, ...]) -> Any:
    names = meta.get("names") or (meta.get("option") or f"--{name.replace('_', '-')}",)
    limits = {limit: meta[limit] for limit in ("min", "max") if limit in meta}
    more = {**limits, **meta.get("more", {})}
    help = meta["help"]
    if choices:
        metavar = f"[{'|'.join(choices)}]"
        if len(metavar) > 22 and "metavar" not in more:  # the help would break it inside a word
            metavar, help = "NAME", f"{help.rstrip('.')}: {', '.join(choices)}."
        more = {"metavar": metavar, "parser": partial(_choose, choices), **more}
    return typer.Option(*names, help=help, rich_help_panel=meta["panel"], **more)


def _choose(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        hint = did_you_mean(text, choices, "")
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(choices)}{hint and f'; {hint}'}")
    return text
