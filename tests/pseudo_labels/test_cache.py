"""Records on disk: what is written is read back, and only by those it was made for."""

import json
import random

import numpy as np
import pytest
import safetensors.numpy

from common.errors import DataError
from pseudo_labels.cache import Arrays, Place, Record, Records, Shard, Weights, put, summary, write_shard


def record(index: int, regions: int, drop: str = "") -> Record:
    draw = np.random.default_rng(index)
    fields = {
        "segments": draw.integers(0, 5, (3, 4 + index % 2)).astype(np.int16),
        "features": draw.normal(size=(regions, 6)).astype(np.float16),
        "masks": draw.random((regions, 5, 7)) > 0.5,
        "value": np.array([index], np.float32),
    }
    return Record(index, f"tree/ü{index}", (30, 40 + index), (3, 4 + index % 2), (0.9, 1.1), fields, drop)


def finished(folder, records: list[Record], shard: int, **facts) -> Records:
    place = Place(folder, "regions", facts)
    for number in range(-(-len(records) // shard)):
        write_shard(place.shard(number), records[number * shard : (number + 1) * shard])
    place.finish(summary(place, len(records), shard, "features"))
    return Records(place)


@pytest.fixture
def written(tmp_path) -> tuple[list[Record], Records]:
    records = [record(i, count) for i, count in enumerate((2, 0, 3, 1, 1))]
    records[3].drop = "too_small"
    del records[4].fields["masks"]
    records.append(Record(5, "cut.png", (0, 0), (0, 0), drop="unreadable"))
    return records, finished(tmp_path, records, 4)


def test_what_is_read_is_what_was_written(written):
    records, found = written
    assert len(found) == 6
    for one, two in zip(records, found.each(), strict=True):
        assert (one.index, one.id, one.size, one.grid, one.extent, one.drop) == (
            two.index, two.id, two.size, two.grid, two.extent, two.drop,
        )  # fmt: skip
        assert one.fields.keys() == two.fields.keys()
        for name, value in one.fields.items():
            assert value.dtype == two.fields[name].dtype
            assert np.array_equal(value, two.fields[name])
    assert found.read(2, ["value"]).fields.keys() == {"value"}
    assert found.read(2).id == "tree/ü2"


def test_rows_of_kept_pictures(written):
    records, found = written
    rows, owner = found.rows("features")
    assert owner.tolist() == [0, 0, 2, 2, 2, 4]
    assert np.array_equal(rows[2:5], records[2].fields["features"])
    assert [len(part) for part in found.rows("nothing")] == [0, 0]


def test_the_summary_counts(written):
    manifest = written[1].manifest
    assert (manifest["kept"], manifest["dropped"]) == (4, {"too_small": 1, "unreadable": 1})
    assert manifest["regions"] == {"mean": 1.5, "least": 0, "most": 3}
    assert manifest["bytes"] == sum(p.stat().st_size for p in (written[1].place.path / "shards").iterdir())


def test_the_same_records_are_the_same_bytes_in_any_order(tmp_path):
    records = [record(i, 2) for i in range(4)]
    write_shard(tmp_path / "a" / "one", records)
    write_shard(tmp_path / "a" / "two", records[::-1])
    assert (tmp_path / "a" / "one").read_bytes() == (tmp_path / "a" / "two").read_bytes()


def test_other_facts_are_another_folder_and_nothing_unfinished_is_complete(tmp_path):
    one, two = Place(tmp_path, "x", {"k": 1, "deep": {"a": [1]}}), Place(tmp_path, "x", {"k": 1, "deep": {"a": [2]}})
    assert one.path != two.path
    assert Place(tmp_path, "x", {"deep": {"a": [1]}, "k": 1}).path == one.path
    assert not one.complete
    one.finish({})
    assert one.complete
    assert not two.complete
    two.path.mkdir()
    put(two.path / "manifest.json", (one.path / "manifest.json").read_bytes())
    assert not two.complete  # copied from another folder
    put(two.path / "manifest.json", b"{")
    assert not two.complete


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    put(tmp_path / "file", b"old")
    monkeypatch.setattr("pseudo_labels.cache.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_damaged_shard_is_named(written):
    path = written[1].place.shard(0)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError) as caught:
        Shard(path)
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert str(caught.value).endswith("); it is removed, and the same command makes it again")
    assert not path.exists()


def everything(place: Place) -> list:
    return [
        (found.index, found.id, found.size, found.grid, found.extent, found.drop, found.fields)
        for found in Records(place).each()
    ]


def read_all(place: Place, table: Place) -> list:
    Arrays(table)
    table.content("weights.safetensors")
    return everything(place)


def test_every_bit_of_a_step_counts(written, tmp_path, caplog):
    """A changed file is named and removed before a stage goes by it, and while records are read."""
    place, draw = written[1].place, random.Random(0)
    table = Place(tmp_path, "table", {})
    table.finish({"arrays": {}}, table=safetensors.numpy.save({"a": np.arange(5.0)}), weights=b"any")
    files = [*(path for path in place.path.rglob("*") if path.is_file()), *table.path.iterdir()]
    assert len(files) == 6
    contents = {path: path.read_bytes() for path in files}
    for _ in range(60):
        for path, content in contents.items():
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            if changed.lower() == content.lower():
                continue  # an escape of json in capital letters: it says the same
            path.write_bytes(changed)
            caplog.clear()
            if draw.random() < 0.5:
                assert not (place.sound and table.sound), path
                assert len(caplog.messages) == 1
                line = caplog.messages[0]
            else:
                with pytest.raises(DataError) as caught:
                    read_all(place, table)
                line = str(caught.value)
            assert line.startswith(f"{path}: cannot be read (")
            assert line.endswith("; it is removed, and the same command makes it again")
            assert not path.exists()
            path.write_bytes(content)
    assert place.sound
    assert table.sound


def test_a_place_is_complete_with_all_its_files_alone(written, tmp_path):
    place = written[1].place
    assert place.complete
    place.shard(1).unlink()
    assert not place.complete
    for name, fact, file in (("table", "arrays", "table.safetensors"), ("net", "steps", "weights.safetensors")):
        place = Place(tmp_path, name, {})
        place.finish({fact: 0}, **{file.partition(".")[0]: b""})
        assert place.complete
        (place.path / file).unlink()
        assert not place.complete


@pytest.mark.parametrize(
    ("file", "read"),
    [("table.safetensors", Arrays), ("weights.safetensors", lambda place: Weights(place).state())],
)
def test_a_damaged_table_or_network_is_named(tmp_path, file, read):
    place = Place(tmp_path, "x", {})
    place.finish({}, **{file.partition(".")[0]: b"a whole file"})
    put(place.path / file, b"half of a file")
    with pytest.raises(DataError) as caught:
        read(place)
    assert str(caught.value) == (
        f"{place.path / file}: cannot be read (changed since it was written); it is removed, and the same command "
        "makes it again"
    )


def test_rows_are_counted_without_reading_them(written, monkeypatch):
    found = written[1]
    monkeypatch.setattr(Shard, "value", lambda *_: pytest.fail("read"))
    assert found.counts("features").tolist() == [2, 0, 3, 0, 1, 0]  # the fourth is dropped
    assert found.counts("masks").tolist() == [2, 0, 3, 0, 0, 0]
    assert found.counts("nothing").tolist() == [0] * 6


def test_a_field_has_one_type(tmp_path):
    one, two = record(0, 1), record(1, 1)
    two.fields["value"] = np.array([1.0])
    with pytest.raises(DataError) as caught:
        write_shard(tmp_path / "step" / "shards" / "x", [one, two])
    assert str(caught.value) == "step: field 'value' has several types or numbers of axes"


def test_a_manifest_names_its_inputs(written):
    content = json.loads((written[1].place.path / "manifest.json").read_text())
    assert content["step"] == "regions"
    assert content["inputs"] == {}
    assert content["pictures"] == 6
