"""What the tests of the data room share: configs, a source in memory, and folders of real files."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from common.errors import DataError
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.files.reading import UnreadableError
from datamodules.folder import FolderDataModule

YAML = Path(__file__).parents[2] / "configs" / "data" / "folder.yaml"


def config(seed: int = 3, **data: object) -> DictConfig:
    """A strict, read-only config with the folder's own yaml, changed by `data`."""
    cfg = OmegaConf.create({"seed": seed, "data": OmegaConf.load(YAML), "evaluation": {"kmeans": {"roots": ["own"]}}})
    OmegaConf.set_struct(cfg, True)
    small = {"batch_size": 4, "eval_batch_size": 2, "workers": 0, "train_size": 16, "eval_size": 16}
    for key, value in (small | data).items():
        cfg.data[key] = value
    OmegaConf.set_readonly(cfg, True)
    return cfg


class Stripes:
    """Picture i has the value i and a ramp to the right; its label is i % 3, with an ignored corner."""

    def __init__(self, count: int, labels: bool = True, broken: tuple[int, ...] = ()) -> None:
        self.count, self.labels, self.broken = count, labels, broken

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"p{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        if index in self.broken:
            raise UnreadableError(f"p{index}.png", "cut")
        image = np.full((20, 26, 3), index, np.uint8) + np.arange(26, dtype=np.uint8)[:, None]
        label = np.full((20, 26), index % 3, np.uint8)
        label[:4, :4] = 255
        return image, label if self.labels else None


class StripesModule(SegmentationDataModule):
    """A data set in memory: 18 training and 5 validation pictures."""

    train, val = Stripes(18), Stripes(5)
    names = ("a", "b", "c")

    def build_source(self, split: str) -> Stripes:
        return self.train if split == "train" else self.val

    def build_meta(self) -> ClassMeta:
        return ClassMeta(self.names, tuple((i, i, i) for i in range(len(self.names))))


def noise(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """A smooth random picture uint8 [H,W,3], so that jpg stays close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_classes(root: Path, names: list[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps(names))


def labelled_folder(root: Path, train: int = 6, val: int = 2, classes: int = 3) -> Path:
    """images/{train,val}, labels/{train,val} and classes.json, with pngs of 32x24 pixels."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            save(root / "images" / split / f"{split}{i}.png", noise(seed=i))
            label = np.random.default_rng(i).integers(0, classes, (24, 32)).astype(np.uint8)
            label[0, 0] = 255
            save(root / "labels" / split / f"{split}{i}.png", label)
    write_classes(root, [f"class{i}" for i in range(classes)])
    return root


def module(root: Path, **data: object) -> FolderDataModule:
    """The pictures below `root` as a data set, ready for use, however few there are."""
    found = FolderDataModule(config(root=str(root), **({"batch_size": 1} | data)))
    found.setup()
    return found


def refused(root: Path, kind: type[Exception] = DataError, **data: object) -> str:
    """What is said of a folder that is no data set."""
    with pytest.raises(kind) as error:
        module(root, **data)
    return str(error.value)
