"""Pictures of more than 8 bits: what range of their values becomes 0..255."""

from PIL import Image


def is_deep(image: Image.Image) -> bool:
    """Whether a file holds more than 8 bits a channel; asked before its pixels are decoded."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or ";16" in raw_mode(image)


def raw_mode(image: Image.Image) -> str:
    """How the values of a picture lie in its file, by Pillow's name, such as RGB;16B; empty where it does not tell."""
    for tile in image.tile:
        args = tile[3]
        found = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ""
        return found if isinstance(found, str) else ""
    return ""
