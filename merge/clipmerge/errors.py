"""Every error that clipmerge raises on purpose.

ClipmergeError
├── CheckpointError        a checkpoint cannot be read: missing, truncated, not a checkpoint
│   └── UnsafeFileError    reading it would need code to run; refused
├── MismatchError          checkpoints do not fit together: names, shapes or dtypes differ
├── RecipeError            an expression that means nothing: unknown name, wrong total, bad syntax
├── NonFiniteError         NaN or infinity in an input, or an output that overflows its dtype
├── OutputError            the output cannot be written: exists, is an input, disk full, read-only
├── ModelError             no such model, or weights that do not fit it
├── DeviceError            no such device or precision, or its memory is full
├── DataError              images or labels that cannot be used
├── SelectionError         a search that cannot choose: no candidates, no split for a role
├── TrainingError          finetuning that cannot go on: non-finite loss, state that does not fit
└── MissingExtraError      an optional library is not installed

ClipmergeWarning           something was taken that nobody stated
"""

__all__ = [
    "CheckpointError",
    "ClipmergeError",
    "ClipmergeWarning",
    "DataError",
    "DeviceError",
    "MismatchError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "OutputError",
    "RecipeError",
    "SelectionError",
    "TrainingError",
    "UnsafeFileError",
]


class ClipmergeError(Exception):
    """Something a user can put right. `message` says what is wrong, `hint` the next step."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint


class ClipmergeWarning(UserWarning):
    """A default was taken where what is known leaves a question open."""


class CheckpointError(ClipmergeError):
    """A checkpoint cannot be read."""


class UnsafeFileError(CheckpointError):
    """A file asks for code that we do not run."""


class MismatchError(ClipmergeError):
    """Checkpoints do not fit together."""


class RecipeError(ClipmergeError):
    """An expression over checkpoints means nothing."""


class NonFiniteError(ClipmergeError):
    """NaN or infinity where numbers must be finite."""


class OutputError(ClipmergeError):
    """An output cannot be written."""


class ModelError(ClipmergeError):
    """No such model, or weights that do not fit it."""


class DeviceError(ClipmergeError):
    """No such device or precision, or its memory is full."""


class DataError(ClipmergeError):
    """Images or labels that cannot be used."""


class SelectionError(ClipmergeError):
    """A search has nothing to choose from, or nothing to choose by."""


class TrainingError(ClipmergeError):
    """Finetuning cannot go on."""


class MissingExtraError(ClipmergeError):
    """An optional library is not installed."""

    def __init__(self, library: str, *, extra: str, what: str) -> None:
        super().__init__(f"{what} needs {library}", hint=f"pip install 'clipmerge[{extra}]'")
