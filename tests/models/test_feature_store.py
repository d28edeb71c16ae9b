"""Features in a file: what is read is what was written, in half precision; what is not whole is never read."""

import errno
import os
import random

import pytest
import torch

from common.errors import ConfigError, DataError
from models import feature_store
from models.backbone import Features
from models.feature_store import FeatureStore, Layout

CPU = torch.device("cpu")
LAYOUT = Layout(((4, 3, 5), (2, 2, 2)), cls=6, prefix=1)


def features(count: int, seed: int = 0) -> Features:
    draw = torch.Generator().manual_seed(seed)
    levels = [torch.randn(count, *shape, generator=draw) for shape in LAYOUT.levels]
    return Features(levels, cls=torch.randn(count, 6, generator=draw), prefix=1)


def provide(path, items=5, parts=((3, 0, 4), (1,)), made=None):
    made = features(5) if made is None else made

    def batches():
        for part in parts:
            yield torch.tensor(part), Features([level[list(part)] for level in made.levels], made.cls[list(part)])

    return feature_store.provide(path, items, LAYOUT, batches(), "5 pictures of 'train'", CPU)


def test_what_was_written_is_read_in_half_precision(tmp_path):
    made = features(5)
    provide(tmp_path / "sub" / "a.features")
    found = FeatureStore.find(tmp_path / "sub" / "a.features").features(torch.tensor([4, 1, 4]), CPU)
    for level, own in zip(found.levels, made.levels, strict=True):
        assert torch.equal(level, own[[4, 1, 4]].half().float())
    assert torch.equal(found.cls, made.cls[[4, 1, 4]].half().float())
    assert found.prefix == 1
    assert Layout.of(made) == LAYOUT
    assert sorted(item.name for item in (tmp_path / "sub").iterdir()) == ["a.features", "a.json"]


def test_a_second_call_computes_nothing(tmp_path):
    provide(tmp_path / "a.features")

    def never():
        raise AssertionError("computed again")
        yield

    store = feature_store.provide(tmp_path / "a.features", 5, LAYOUT, never(), "x", CPU)
    assert len(store.rows) == 5


@pytest.mark.parametrize("hurt", ["cut", "no json", "json of another"])
def test_what_is_not_whole_is_made_again(hurt, tmp_path):
    path = tmp_path / "a.features"
    provide(path)
    if hurt == "cut":
        os.truncate(path, path.stat().st_size - 2)
    elif hurt == "no json":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"items": 5}')
    assert FeatureStore.find(path) is None
    other = features(5, seed=1)
    provide(path, made=other)
    assert torch.equal(FeatureStore.find(path).features(torch.tensor([3]), CPU).levels[0], other.levels[0][3:4].half())


def test_every_bit_of_a_file_counts(tmp_path, caplog):
    """Rows that were changed are computed again and put back; a file whose sums or json were is made anew."""
    path, made, draw = tmp_path / "a.features", features(5), random.Random(0)
    provide(path)
    files = {file: file.read_bytes() for file in (path, path.with_suffix(".json"))}

    def again(rows):
        return Features([level[[rows_of[row] for row in rows]] for level in made.levels], made.cls[rows_of][rows], 1)

    rows_of = [3, 0, 4, 1]
    for _ in range(150):
        for file, content in files.items():
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            caplog.clear()
            found = provide(path).features(torch.tensor(rows_of), CPU, again)
            assert torch.equal(found.levels[1], made.levels[1][rows_of].half().float())
            assert torch.equal(found.cls, made.cls[rows_of].half().float())
            lines = [line for line in caplog.messages if "not what was written" in line]
            unread = bytes(changed)[:740] != content[:740] and not lines  # the row of no picture
            assert unread or len(lines) == 1
            file.write_bytes(content) if unread else None
            assert {file: file.read_bytes() for file in files} == files


def test_a_changed_row_is_named_where_it_cannot_be_computed(tmp_path):
    store = provide(tmp_path / "a.features")
    content = bytearray(store.path.read_bytes())
    content[0] ^= 1
    store.path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        FeatureStore(store.path).features(torch.tensor([3, 0]), CPU)
    assert str(caught.value) == (
        f"{store.path}: features of picture 0 are not what was written; delete that file, so that it is made again"
    )


def test_a_picture_that_could_not_be_read_is_named(tmp_path):
    path = tmp_path / "a.features"
    store = provide(path)  # item 2 came in no batch
    assert store.missing == {2}
    with pytest.raises(DataError) as caught:
        store.features(torch.tensor([0, 2]), CPU)
    assert str(caught.value) == (
        f"backbone.cache_features: picture 2 could not be read when {path} was made; delete that file, so that it is "
        "made again"
    )


def test_too_small_a_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda path: Free)
    with pytest.raises(ConfigError) as caught:
        provide(tmp_path / "a.features")
    assert str(caught.value) == (
        f"backbone.cache_features=true: features of the 5 pictures of 'train' need 780 B, but {tmp_path} has 700 B "
        "free; set cache.dir to a larger disk, or backbone.cache_features=false"
    )
    assert not list(tmp_path.iterdir())


class Free:
    free = 700


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_store.os, "pwrite", full)
    with pytest.raises(DataError, match="cannot be written \\(No space left on device\\); it is gone again; set cache"):
        provide(tmp_path / "a.features")
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    made = features(5)
    made.levels[0][3, 0, 0, 0] = 1e5
    with pytest.raises(DataError) as caught:
        provide(tmp_path / "a.features", made=made)
    assert str(caught.value) == (
        "backbone.cache_features=true: a feature of the 5 pictures of 'train' is above 65,504, the largest number of "
        "float16; set backbone.cache_features=false"
    )
    assert FeatureStore.find(tmp_path / "a.features") is None


def test_the_name_depends_on_every_fact():
    names = {feature_store.name(*facts) for facts in (("a", "b"), ("a", "c"), ("ab",), ("a", "b", "c"))}
    assert len(names) == 4
