"""Tables of label values: void is silent, what no table knows is counted, nothing becomes class 0 by accident."""

import numpy as np

from datamodules.base.label_map import ForeignIds, LabelMap


def test_known_void_and_foreign_values():
    label, foreign = LabelMap({7: 0, 8: 1}, ignored=[0, 255])(np.array([[7, 8, 0, 255, 9, 9]], np.uint8))
    assert label.dtype == np.uint8
    assert label.tolist() == [[0, 1, 255, 255, 255, 255]]
    assert foreign == {9: 2}


def test_values_beyond_a_byte():
    values = np.array([[7, 263, -1, 65535, 256 + 7, 70000]], np.int32)
    label, foreign = LabelMap({7: 0})(values)
    assert label.tolist() == [[0, 255, 255, 255, 255, 255]]
    assert foreign == {-1: 1, 263: 2, 65535: 1, 70000: 1}


def test_void_can_be_a_class():
    assert LabelMap({0: 0, 255: 0})(np.array([[255, 0]], np.uint8))[0].tolist() == [[0, 0]]


def test_the_account_counts_a_file_once_and_names_a_value_once(caplog):
    account = ForeignIds("val")
    for _ in range(2):
        account.add({"a.png": {9: 4, 12: 1}})
    account.add({"b.png": {9: 6}})
    account.add({"c.png": {13: 2}}, told=True)
    account.sync()
    assert account.pixels == {9: 10, 12: 1, 13: 2}
    assert [record.getMessage() for record in caplog.records] == [
        f"a.png: {pixels} pixels have the value {value}, which is in no table of this data set; they are ignored, and "
        "so is this value wherever else it occurs in 'val'"
        for value, pixels in ((9, 4), (12, 1))
    ]
