"""Groups of options: a frozen dataclass whose fields are the options of every command that takes it."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer


def opt(help: str, panel: str | None = None, *names: str, **more: Any) -> Any:
    """Describe an option. Its name is the parameter's own (`dry_run` is --dry-run) unless `names` say others."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def setting(group: type, name: str, panel: str | None = None, **more: Any) -> Any:
    """Describe an option by the metadata of a library's dataclass field: its meaning, limits and panel."""
    (field,) = (field for field in fields(group) if field.name == name)
    meta = field.metadata
    names = (meta["option"],) if meta["option"] else ()
    return opt(meta["help"], panel or meta["panel"], *names, min=meta["min"], max=meta["max"], **more)


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function with the options of each group as its own keywords, for typer, which knows no groups.

    An option that the command spells itself as well is left out of the group, whose field keeps its default.
    """
    hints = get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    members: dict[str, list[str]] = {}
    for name, parameter in own.items():
        if name in groups:
            options = {n: p for n, p in _options(groups[name]).items() if n not in own or n in groups}
            members[name] = list(options)
            parameters += options.values()
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))

    @wraps(command)
    def flat(**options: Any) -> None:
        made = {name: group(**{n: options.pop(n) for n in members[name]}) for name, group in groups.items()}
        command(**made, **options)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


def _options(group: Any) -> dict[str, inspect.Parameter]:
    """Return a parameter for each field; a field without `opt` has it from its metadata, or is no option."""
    hints = get_type_hints(group, include_extras=True)
    options = {}
    for field in fields(group):
        hint = hints[field.name]
        if not hasattr(hint, "__metadata__"):
            if not field.metadata.get("panel"):
                continue
            hint = Annotated[hint, setting(group, field.name)]
        options[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hint
        )
    return options


def _default(field: "Field[Any]") -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
