"""Facts about classes."""

from common.spec import ClassMeta
from datamodules.scenes.drawing import META


def test_groups_are_told_apart_only_where_the_data_does():
    assert ClassMeta(("a", "b", "c")).groups == {}
    assert ClassMeta(("a", "b", "c"), things=(1,)).groups == {"things": (1,), "stuff": (0, 2)}
    assert ClassMeta(("a", "b"), things=(0, 1)).groups == {"things": (0, 1)}
    assert [META.names[i] for i in META.groups["things"]] == ["car", "boat", "animal", "person"]
