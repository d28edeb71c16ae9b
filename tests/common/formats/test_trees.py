"""Files of keys and values that cannot be read, or stand for more than they hold."""

import pytest

from common.formats import trees

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 200000, "nested too deeply"),
        (b"a: [1, 2", "line 1"),
        (b"a: \xe9", "not text in UTF-8"),
        (b"a: !!python/object/apply:os.system [ls]", "line 1"),
        (b"a: 2020-99-99", "month must be in 1..12"),
        (BOMB.encode(), "aliases make more than 1000000 values of it"),
        (b"a: &a [*a]", "an alias stands inside of what it stands for"),
    ],
)
def test_a_yaml_that_cannot_be_read(content, said, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(trees.TreeError) as caught:
        trees.yaml_of(path)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 200000, "nested too deeply"),
        (b"[1,", "Expecting value: line 1 column 4 (char 3)"),
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b'["\xe9"]', "not text in UTF-8"),
        (b"1" * 5000, "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use"),
    ],
)
def test_a_json_that_cannot_be_read(content, said, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(trees.TreeError) as caught:
        trees.json_of(path)
    assert str(caught.value).startswith(said)


def test_marks_of_editors_and_aliases_of_people_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert trees.json_of(path) == [1, 2]
    path.write_bytes("a: [é]".encode("utf-16"))
    assert trees.yaml_of(path) == {"a": ["é"]}
    path.write_text("a: &a [1, 2]\nb: *a\nc: [*a, *a]\n")
    assert trees.yaml_of(path) == {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]]}
