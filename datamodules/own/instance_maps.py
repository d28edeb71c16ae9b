"""Objects of a user's pictures one by one: a png beside each picture, in which every object has a number.

It lies where the picture does, with a folder `instances` in the place of the folder of pictures: `instances/val/a.png`
of `images/val/a.jpg`, or `val/instances/a.png` of `val/images/a.jpg`. Grey, 8 or 16 bit, as large as the picture: 0 is
nothing, every other value one object. So `run.py predict` writes them.
"""

from pathlib import Path

from common.errors import DataError
from datamodules.base.instances import Instances
from datamodules.files.reading import header_size, read_label
from datamodules.own.layouts import PICTURES

FOLDER = "instances"


def beside(picture: str) -> Path | None:
    """The map of a picture; None where there is none."""
    path = Path(picture)
    for number in range(len(path.parts) - 2, 0, -1):
        if path.parts[number].lower() in PICTURES:
            found = Path(*path.parts[:number], FOLDER, *path.parts[number + 1 :]).with_suffix(".png")
            return found if found.is_file() else None
    return None


def read(path: Path, picture: str) -> Instances:
    """The objects of a map. Raises UnreadableError for a broken file, DataError for colours or for another size than
    the picture's."""
    ids = read_label(str(path), "a map of objects holds one number per pixel")
    size = header_size(picture)
    if ids.shape != size:
        raise DataError(
            f"{path}: the map of objects is {ids.shape[0]} x {ids.shape[1]} pixels (height x width) and its picture "
            f"{size[0]} x {size[1]}; save it at the picture's own size"
        )
    return Instances.of_map(ids)
