"""Prepare an image as transformers' image processors do, by PIL."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ResizeAndCrop"]


class ResizeAndCrop:
    """Resize, then crop at the centre; an image that is smaller than the crop gets black margins.

    Args:
        steps: "resize" (the shorter edge, [height, width], or None) and "crop" ([height, width] or None).
        interpolation: PIL's name of a filter.

    Source: transformers' `PilBackend`, whose pixels these are.
    """

    def __init__(self, steps: Mapping[str, Any], interpolation: str) -> None:
        from PIL.Image import Resampling

        self.resize, self.crop = steps["resize"], steps["crop"]
        self.filter = Resampling[interpolation.upper()]

    def __call__(self, image: "Image") -> "Image":
        image = image.convert("RGB")
        if self.resize is not None:
            image = image.resize(self._size(*image.size), self.filter)
        if self.crop is not None:
            (height, width), (wide, tall) = self.crop, image.size
            left, top = (wide - width) // 2, (tall - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return image

    def _size(self, wide: int, tall: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short, long = sorted((wide, tall))
        longer = int(self.resize * long / short)
        return (self.resize, longer) if wide <= tall else (longer, self.resize)
