"""Which attributes of a scripted class are its state: the archive's code says so in two lists of names.

The code is text to us. Plain tensor attributes (an attention mask) stand beside parameters in the archive's
pickle and are no part of a state dict.
"""

import re

from clipmerge.checkpoint.zip_file import ZipFile

MAX_CODE = 8 << 20
_CLASS = re.compile(r"^class (\w{1,200})\(Module\):$", re.MULTILINE)
_LIST = re.compile(r"^  __(?:parameters|buffers)__ = \[([^\]\n]*)\]$", re.MULTILINE)
_NAME = re.compile(r'"([^"\n]{1,200})"')


class Members:
    """Class path → names of its parameters and buffers, or None where its code does not say."""

    def __init__(self, archive: ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._known: dict[str, frozenset[str]] = {}
        self._read: set[str] = set()

    def __call__(self, cls: str) -> frozenset[str] | None:
        """The names of the parameters and buffers of `__torch__.module.Class`."""
        module = cls.rpartition(".")[0]
        entry = f"{self._folder}/code/{module.replace('.', '/')}.py"
        if entry in self._archive.entries and entry not in self._read:
            self._read.add(entry)
            self._learn(module, self._archive.read(entry, MAX_CODE).decode())
        return self._known.get(cls)

    def _learn(self, module: str, code: str) -> None:
        starts = list(_CLASS.finditer(code))
        ends = [match.start() for match in starts[1:]] + [len(code)]
        for match, end in zip(starts, ends, strict=True):
            lists = _LIST.findall(code, match.end(), end)
            self._known[f"{module}.{match[1]}"] = frozenset(_NAME.findall(" ".join(lists)))
