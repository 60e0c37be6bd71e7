"""A figure that notebooks show."""

from io import BytesIO

from matplotlib.figure import Figure

__all__ = ["NotebookFigure"]


class NotebookFigure(Figure):
    """A figure that shows itself: notebooks know only those of pyplot, which keeps every figure in memory."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png", facecolor="white")
        return content.getvalue()
