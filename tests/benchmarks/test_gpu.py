"""What runs on a GPU runs here first: one method with everything that a row has, and what ends early says so."""

import warnings

import pytest
import torch

from benchmarks import gpu, steps
from benchmarks.gpu import Bench, Row
from benchmarks.stepping import Cost, Setting, Timer


@pytest.mark.train
def test_one_method_on_the_cpu_fills_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "quiet", lambda: None)  # it silences the whole process
    before = torch.get_float32_matmul_precision()
    page = tmp_path / "GPU.md"
    words = ["--device", "cpu", "--scale", "tiny", "--only", "segsort", "--no-tests", "--output", str(page)]
    try:
        assert gpu.main(words) == 0
    finally:
        torch.set_float32_matmul_precision(before)
    text = page.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| segsort")]
    assert [row[3] for row in rows] == list(gpu.PRODUCTS)
    assert all(float(row[4]) > 0 and row[2] == "4" for row in rows)
    assert rows[0][6] == "-"
    assert float(rows[2][6]) < 0.1
    assert "sorting, 8 x 8 x 8" in text
    assert "Not measured" not in text


def test_nothing_is_begun_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "quiet", lambda: None)
    page = tmp_path / "GPU.md"
    words = ["--device", "cpu", "--scale", "tiny", "--only", "stego", "--no-tests", "--seconds", "0"]
    assert gpu.main([*words, "--output", str(page)]) == 0
    assert "because the 0 s were over: stego float32, stego TF32, stego bf16 backbone." in page.read_text()


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def costs(setting, *_):
        tried.append(setting.words[-1])
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return [Cost("step of 1 picture", 2.0, 1.0, None, {}, 1.0)]

    monkeypatch.setattr(gpu.stepping, "costs", costs)
    bench = Bench("cpu", "tiny", 100.0)
    found = gpu.measured(Row("stego", "float32", gpu.setting_of("stego", bench)), bench)
    assert tried == [f"data.batch_size={size}" for size in (4, 2, 1)]
    assert (found.batch, found.error) == (1, "")
    assert gpu.cells(found, found)[4:6] == ["0.5", "50%"]


def test_a_row_that_fails_says_why(monkeypatch):
    def costs(*_):
        raise ValueError("no such thing\nat all")

    monkeypatch.setattr(gpu.stepping, "costs", costs)
    bench = Bench("cpu", "tiny", 100.0)
    found = gpu.measured(Row("stego", "float32", gpu.setting_of("stego", bench)), bench)
    assert gpu.cells(found, None)[4] == "failed: ValueError: no such thing"


def test_full_rows_have_the_published_batch_and_one_size():
    bench = Bench("cuda", "full", 100.0)
    words = dict(word.split("=", 1) for word in gpu.setting_of("hidden_positives", bench).words)
    assert words["experiment"] == "hidden_positives_cocostuff27_vits8"
    assert "data.batch_size" not in words
    assert words["data.train_size"] == "224"
    assert words["trainer"] == "gpu"
    assert dict(word.split("=", 1) for word in gpu.setting_of("dino", bench).words)["data.batch_size"] == "16"
    assert [row.products for row in gpu.rows_of("hsg", bench)][:3] == ["float32", "TF32", "bf16-mixed"]


def test_a_batch_is_made_of_fewer_pictures():
    small = {"image": torch.rand(2, 3, 4, 4), "label": torch.arange(32).view(2, 4, 4), "id": ["a", "b"], "broken": []}
    found = gpu.repeated(small, 5, torch.device("cpu"))
    assert found["id"] == ["a", "b", "a", "b", "a"]
    assert found["broken"] == []
    assert torch.equal(found["label"][4], small["label"][0])
    assert not torch.equal(found["image"][4], found["image"][0])
    assert (found["image"] - 0.9 * small["image"][torch.tensor([0, 1, 0, 1, 0])]).max() <= 0.1 + 1e-6


def test_a_row_without_a_cost_is_no_number():
    row = Row("stego", "float32", Setting("stego", "default", ()), error="x")
    assert len(gpu.cells(row, None)) == len(gpu.HEAD)


def test_waits_for_the_device_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = gpu.Waits("cuda")
    with waits.counted():
        for text in (
            "called a synchronizing CUDA operation",
            "something else",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(text, stacklevel=1)
    assert (waits.count, modes) == (2, ["warn", "default"])


def test_time_on_a_gpu_is_that_of_its_events(monkeypatch):
    clock = iter([0.0, 2000.0, 5000.0, 7000.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return other.at - self.at

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    timer = Timer("cuda")
    with timer.span("step"), timer.span("backbone"):
        assert not waited
    assert timer.take() == {"step": 4.0, "backbone": 3.0}
    assert waited
