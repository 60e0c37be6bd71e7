"""Check shape annotations at run time: jaxtyping and beartype around every function of clipmerge that has any.

The library names jaxtyping for type checkers only, so that users need not install it. Here each module of the package
is wrapped right after it was executed: nothing else has had the chance to import its plain functions by then, and
processes that tests start are left alone.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

SHAPED = re.compile(r"\b(Float|Float32|Float64|Int|Int64|UInt8|Num|Bool|Shaped)\[")

checked: set[str] = set()
"""Full names of the functions that are checked."""
unresolved: list[str] = []
"""Shape annotations that cannot be evaluated, with the reason: a test demands that there are none."""


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if "jaxtyping" in (self.get_source(module.__name__) or ""):
            _check_members(module, module.__name__)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "clipmerge":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check shapes in every module of clipmerge that is imported from now on."""
    sys.meta_path.insert(0, _Finder())


def _check_members(owner: Any, module: str) -> None:
    for name, member in list(vars(owner).items()):
        if getattr(member, "__module__", None) != module:
            continue
        if inspect.isclass(member) and member.__qualname__.startswith(getattr(owner, "__qualname__", "")):
            _check_members(member, module)
        elif isinstance(member, FunctionType):
            hints = _shaped_hints(member)
            if hints:
                setattr(owner, name, _checked(member, hints))
                checked.add(f"{module}.{member.__qualname__}")


def _shaped_hints(function: FunctionType) -> dict[str, Any]:
    """Return the annotations with shapes, evaluated. All others are for mypy, which has seen them already."""
    import collections.abc

    import jaxtyping
    import numpy as np
    import torch

    arrays = dict.fromkeys(("Bools", "Bytes", "Floats", "Ints", "Pixels"), np.ndarray)  # clipmerge.types'
    names = {**vars(collections.abc), **vars(jaxtyping), "torch": torch, "Tensor": torch.Tensor}
    names |= {**function.__globals__, **arrays}
    hints = {}
    for name, hint in function.__annotations__.items():
        text = hint if isinstance(hint, str) else str(hint)
        if SHAPED.search(text):
            try:
                hints[name] = eval(hint, names) if isinstance(hint, str) else hint
            except Exception as error:
                unresolved.append(f"{function.__module__}.{function.__qualname__}: {name}: {hint}: {error}")
    return hints


def _checked(function: FunctionType, hints: dict[str, Any]) -> Callable[..., Any]:
    import torch
    from beartype import beartype
    from jaxtyping import jaxtyped

    plain_hints, function.__annotations__ = function.__annotations__, hints
    strict = jaxtyped(function, typechecker=beartype)
    function.__annotations__ = strict.__annotations__ = plain_hints

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        # torch.compile would trace the checks; it sees the plain function instead.
        return function(*args, **kwargs) if torch.compiler.is_compiling() else strict(*args, **kwargs)

    return either
