"""Pictures with infrared, from their files to what is shown of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import config
import run
from common.errors import ConfigError
from common.spec import Photometric
from datamodules.base.resizing import resize_picture
from datamodules.base.views import draw_colour, recolour
from datamodules.files.reading import UnreadableError, read_picture
from datamodules.potsdam3 import read_block
from engine import setup
from tests.conftest import small_words
from tests.datamodules.pictures import noise, save
from tests.support.words import error_line

NET = ["backbone=net10a", "backbone.create.in_chans=4", "backbone.create.widths=[4,4,6,6,8,8]"]


def block(seed=0, height=40, width=48) -> np.ndarray:
    """uint8 [H,W,4] whose fourth channel is no transparency."""
    return np.dstack([noise(height, width, seed), noise(height, width, seed + 100)[..., 0]])


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_four_bands_are_read_as_they_are(tmp_path, ending):
    picture = block()
    path = save(tmp_path / f"a.{ending}", picture)
    assert np.array_equal(read_picture(path, channels=4), picture)
    assert read_picture(path).shape == (40, 48, 3)


def test_a_file_of_three_bands_is_named(tmp_path):
    path = save(tmp_path / "a.png", noise())
    with pytest.raises(UnreadableError, match=r"3 bands of mode RGB; data\.channels=4 needs red, green, blue and"):
        read_picture(path, channels=4)


def test_blocks_of_potsdam_with_infrared(tmp_path):
    savemat(tmp_path / "a.mat", {"img": block()})
    assert np.array_equal(read_block(str(tmp_path / "a.mat"), channels=4), block())
    assert np.array_equal(read_block(str(tmp_path / "a.mat")), block()[..., :3])


@pytest.mark.parametrize("interpolation", ["bilinear", "faithful", "bilinear_plain", "nearest_corner"])
def test_no_channel_bends_another_when_resized(interpolation):
    picture = block()
    found = resize_picture(picture, (17, 20), interpolation)
    assert np.array_equal(
        found[..., :3], resize_picture(np.ascontiguousarray(picture[..., :3]), (17, 20), interpolation)
    )
    other = picture.copy()
    other[..., 3] = 0
    assert np.array_equal(found[..., :3], resize_picture(other, (17, 20), interpolation)[..., :3])
    assert found[..., 3].std() > 10


@pytest.mark.parametrize("faithful", [False, True])
def test_colour_changes_leave_infrared_alone(faithful):
    spec = Photometric(gray_p=1.0, blur_p=0.0, solarize_p=1.0, faithful=faithful)
    image = torch.rand(3, 4, 8, 8)
    drawn = draw_colour(spec, 3, np.random.default_rng(0))
    found = recolour(image, spec, drawn)
    assert torch.equal(found[:, 3], image[:, 3])
    torch.testing.assert_close(found[:, :3], recolour(image[:, :3], spec, drawn))
    assert not torch.equal(found[:, :3], image[:, :3])
    blurred = recolour(
        image,
        Photometric(jitter_p=0, gray_p=0, blur_p=1),
        draw_colour(Photometric(blur_p=1), 3, np.random.default_rng(0)),
    )
    assert not torch.equal(blurred[:, 3], image[:, 3])


def test_another_number_of_channels_than_the_backbone_takes_is_refused():
    words = ["data=folder", "data.root=/nowhere", "data.channels=4", "method=kmeans_baseline", "backbone=tiny"]
    with pytest.raises(ConfigError, match=r"^data\.channels=4: backbone=tiny takes pictures of 3 channels; set"):
        setup.build_model(config.compose(words), setup.ClassMeta())


@pytest.mark.train
def test_a_run_is_shown_and_predicts(tmp_path, capsys):
    for number in range(6):
        save(tmp_path / "pictures" / f"{number}.png", block(number))
    words = small_words(
        "iic", "data=folder", f"data.root={tmp_path}/pictures", "data.channels=4", "method.num_clusters=3", *NET,
        "method.pass_steps=2", "data.train_size=32", "data.eval_size=32", "cache.dir=" + str(tmp_path / "cache"),
        "data.cache=disk", "data.batch_size=2", "trainer.max_steps=4", f"run.dir={tmp_path}/runs", "run.name=a",
    )  # fmt: skip
    assert run.main(["train", *words]) == 0
    assert np.asarray(Image.open(tmp_path / "runs/a/panels/sheet.png")).std() > 10
    ckpt = f"ckpt={tmp_path}/runs/a/checkpoints/last.ckpt"
    for name, more in (("whole", []), ("windows", ["predict.window=16"])):
        assert run.main(["predict", ckpt, f"input={tmp_path}/pictures", f"output={tmp_path}/{name}", *more]) == 0
        over = np.asarray(Image.open(tmp_path / name / "overlay" / "0.png"))
        assert over.shape == (40, 48, 3)
        assert np.asarray(Image.open(tmp_path / name / "index" / "0.png")).shape == (40, 48)
    picture = f"image={tmp_path}/pictures/0.png"
    assert run.main(["explain", ckpt, picture, "point=5,5", f"output={tmp_path}/explained"]) == 0
    assert run.main(["clusters", ckpt]) == 0
    assert run.main(["export", ckpt, f"output={tmp_path}/model.pt2"]) == 0
    save(tmp_path / "three" / "0.png", noise())
    line = error_line(capsys, "predict", ckpt, f"input={tmp_path}/three", f"output={tmp_path}/none")
    assert "none of its 1 pictures could be read" in line
