"""Facts that data, methods and evaluation tell each other. Plain data, next to no behaviour.

Glossary of shapes, used in every docstring: B pictures, C feature channels, D code dimension, H W pixels, h w patches,
N = B*h*w patches of a batch, K clusters, M entries of a bank, S segments, T tokens.
"""

from dataclasses import dataclass
from typing import Any

from common.names import shown

IGNORE = 255
"""The label of pixels that no score counts."""
OUTSIDE = -1
"""The region of places that are no part of the picture; every other region id is 0 or more."""


def channels_of(data: Any) -> int:
    """Channels of the pictures of a data set, by its keys `data.*`: `data.channels` where it has that key, else 3."""
    return int(data.get("channels", 3))


@dataclass(frozen=True)
class ClassMeta:
    """Class names and colours of a data set. `names` is empty where there are no labels."""

    names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    things: tuple[int, ...] = ()
    """Ids of the classes that are things, the others being stuff; empty where the data set does not tell them apart."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(shown(name) for name in self.names))

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def has_labels(self) -> bool:
        return bool(self.names)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Class ids of `things` and `stuff`, a group that has any; empty where they are not told apart."""
        stuff = tuple(i for i in range(self.num_classes) if i not in self.things)
        return {name: ids for name, ids in (("things", self.things), ("stuff", stuff)) if ids} if self.things else {}


@dataclass(frozen=True)
class Photometric:
    """Colour changes of a view; one draw a picture. Strengths as in torchvision's ColorJitter."""

    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.1
    jitter_p: float = 1.0
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_kernel: int = 5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    """Probability that values of 0.5 and more are inverted (BYOL, DINO); comes last."""
    either: bool = False
    """Whether jitter and grey exclude each other: a fair coin decides which of the two may happen to a picture, with
    its probability (PriMaPs)."""
    separate: bool = False
    """Whether each of the four changes of the jitter happens by itself with probability `jitter_p`, in the order in
    which they stand here (PiCIE)."""
    faithful: bool = False
    """As released by HP: the jitter acts on ImageNet-normalised floats and clamps them to 0..1."""


@dataclass(frozen=True)
class Geometric:
    """Random resized crop and flip of a view; one draw a picture."""

    size: int | tuple[int, int] | None = None
    """Side of the square result in pixels, or (H,W); None keeps the size of the source view."""
    scale: tuple[float, float] = (0.8, 1.0)
    """Share of the source's area that the crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    zoom: tuple[float, float] | None = None
    """Where set, instead of `scale` and `ratio`: the picture is scaled by a factor drawn from this range, and a window
    of `size` is cut out; where the scaled picture is smaller, it reaches beyond the right and lower border (HSG)."""
    sides: tuple[float, float] | None = None
    """Where set, instead of `scale` and `ratio`: the crop has the source's aspect, and its sides are a share of the
    source's that is uniform in this range (TransFGU)."""
    side_step: float | None = None
    """Where set, only the lower end of `sides` and every further such step up to the upper end are drawn."""
    whole_cells: bool = False
    """With `sides`: on whatever the crop is replayed, a picture or a map of features, it takes whole cells of that
    grid and nothing beyond them, so that its place differs between the two by a cell at most (PiCIE)."""


@dataclass(frozen=True)
class Affine:
    """Random linear map of a view about its centre, after colour; 0 where it reaches beyond the picture (IIC). One draw
    a picture."""

    rotation: float = 30.0
    """Degrees, either way."""
    shear: float = 10.0
    """Degrees, either way."""
    scale: tuple[float, float] = (0.8, 1.2)
    """Side of what is seen, as a share of the side of the view."""


@dataclass(frozen=True)
class RegionSpec:
    """Contour regions of every training picture, made without labels: see {grouping,datamodules}/regions.py."""

    source: str = "felzenszwalb"
    """felzenszwalb | watershed | slic, computed once; or folder: files that are there."""
    root: str | None = None
    """Folder of region files, with source folder."""
    most: int = 48
    """Regions of a picture at most; thresholds are raised until it is kept."""
    thresholds: tuple[float, ...] = (100, 300, 600, 1000, 2000, 4000, 8000)
    """Scales of felzenszwalb, or border strengths (0..1) of watershed, to try in ascending order."""
    sigma: float = 0.8
    """Blur of felzenszwalb before it looks, px."""
    min_size: int = 100
    """Smallest region of felzenszwalb, px."""
    compactness: float = 10.0
    """Of slic: weight of space against colour."""


@dataclass(frozen=True)
class Cover:
    """What a view has to show of one value of a map that is carried along, so that it is no crop beside the object or
    inside of it. Views that name an equal cover are drawn anew together until all of them show it."""

    map: str = "pseudo"
    value: int = 1
    share: tuple[float, float] = (0.01, 0.99)
    """Of the view's pixels, both ends included."""
    tries: int = 3
    """Draws of the crop; where none will do, the views show the whole picture."""


@dataclass(frozen=True)
class Meeting:
    """How much of other views a view has to show: it alone is drawn anew until it does, the others stand."""

    views: tuple[str, ...]
    """Names of views that stand before it."""
    share: float = 0.01
    """The common part with each of them has a larger area than this share of the source's."""
    of_own: bool = False
    """Whether it is a share of the view's own area instead (SlotCon)."""
    tries: int = 100
    """Draws of the crop."""
    whole: bool = True
    """Where none will do: the view shows the whole picture, or (False) the last draw stands (SlotCon)."""


@dataclass(frozen=True)
class ViewSpec:
    """A view of the batch that a method asks for: `{"augmented": ViewSpec(photometric=Photometric())}`.

    Geometry comes first, colour second, an affine map last, all on the device, from keyed parameters.
    """

    photometric: Photometric | None = None
    geometric: Geometric | None = None
    affine: Affine | None = None
    source: str = "image"
    cover: Cover | None = None
    meets: Meeting | None = None
    of_epoch: bool = False
    """Whether the draws belong to (epoch, picture), so that every pass over the pictures of an epoch sees the same
    view; else to the step and the place in its batch."""


@dataclass(frozen=True)
class NeighbourSpec:
    """A near training picture beside every picture of a batch, as `neighbour`: datamodules/base/module.py."""

    drawn: int = 7
    """One of this many nearest pictures is drawn uniformly, anew in every epoch."""
    stored: int = 30
    """Nearest pictures kept in the table."""
    dropout: float = 0.0
    """Channel dropout on the pooled features that pictures are compared by (released by accident with 0.1)."""
    same_picture: bool = False
    """Whether another crop of the same picture may be its neighbour (as released)."""
