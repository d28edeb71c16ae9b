"""The orientation tag of a picture, and setting it upright."""

from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""From the EXIF orientation to what sets the picture upright."""


def orientation(image: Image.Image) -> int:
    """1 to 8; 1 where there is no tag."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a spoilt EXIF block leaves the pixels as they are
        return 1


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture as viewers show it."""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)
