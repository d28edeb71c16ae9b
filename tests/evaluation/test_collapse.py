"""A collapsed teacher is noticed once, a healthy one and a passing dip never."""

import logging

from evaluation.collapse import PATIENCE, CollapseWatch

HEALTHY = {"usage": 0.8, "entropy": 0.4, "spread": 0.6}


def test_a_healthy_teacher_is_left_alone(caplog):
    watch = CollapseWatch(grace=0)
    assert not [said for step in range(100) if (said := watch.look(step, HEALTHY))]
    assert not caplog.records


def test_collapse_is_said_once_with_its_step(caplog):
    watch = CollapseWatch(grace=50)
    with caplog.at_level(logging.WARNING):
        said = [watch.look(step, {**HEALTHY, "usage": 0.01}) for step in range(0, 300, 10)]
    assert [number for number, text in enumerate(said) if text] == [5 + PATIENCE - 1]
    assert said[9] == (
        "the teacher has collapsed: train/teacher_usage is 0.010, below 0.1, since step 50 (every picture gets the "
        "same prototypes); lower optim.student.lr, raise method.momentum, or lower method.temperature.teacher"
    )
    assert [record.getMessage() for record in caplog.records] == [said[9]]


def test_a_uniform_output_and_equal_features_are_collapse_too():
    for values in ({"entropy": 0.999}, {"spread": 0.001}):
        watch = CollapseWatch(grace=0)
        assert any(watch.look(step, HEALTHY | values) for step in range(PATIENCE))


def test_a_passing_dip_is_none():
    watch = CollapseWatch(grace=0)
    values = [HEALTHY | ({"usage": 0.0} if step % PATIENCE else {}) for step in range(50)]
    assert not any(watch.look(step, value) for step, value in enumerate(values))
