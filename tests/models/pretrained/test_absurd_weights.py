"""Weight files and checkpoints that are small on disk and large in memory, and weights that are no numbers."""

import zipfile

import pytest
import torch

from common.errors import CheckpointError, WeightsError
from common.formats.archives import unfolds
from engine import checkpoints, setup
from models.pretrained import weights
from tests.models.pretrained.test_weights import NET, fit, make_state


def test_a_tensor_of_more_values_than_the_file_holds_is_refused(tmp_path):
    """1.5 kB that would be 256 GB in float32."""
    huge = torch.zeros(1).half().expand(1 << 36)
    torch.save({"state_dict": make_state() | {"head.x": huge}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"weights=w.pth: tensor head.x of shape \[68719476736\] is no plain array"):
        fit(weights.read(tmp_path / "w.pth"))


def test_shapes_are_compared_before_values_are_taken_to_float32(monkeypatch):
    """The network takes 76 values; a file of 4 million is refused as it is."""
    made = []
    own = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda value: made.append(value.numel()) or own(value))
    with pytest.raises(WeightsError, match=r"first differing key cls_token: expected \[1, 1, 4\], found no such key"):
        fit({"other.weight": torch.zeros(2000, 2000).half()})
    assert sum(made) < 1000
    fitted = fit({key: value.half() for key, value in make_state().items()} | {"head.x": torch.zeros(9999).half()})
    assert all(value.dtype == torch.float32 for value in fitted.state.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    state = make_state()
    state["blocks.0.attn.qkv.weight"][3, 1] = bad
    with pytest.raises(WeightsError) as caught:
        fit(state)
    assert str(caught.value) == (
        "backbone.weights=w.pth: tensor blocks.0.attn.qkv.weight holds 1 of 48 values that are not finite (NaN, "
        "infinity); take an earlier file of the training that they come from"
    )
    fit(make_state() | {"head.x": torch.full((2,), bad)})  # what the network does not take may hold anything


def test_float16_overflow_is_seen_after_the_conversion_to_float32():
    assert set(fit({key: value.half() for key, value in make_state().items()}).state) == set(NET)


@pytest.fixture(params=["deflated", "shared"])
def folded(request, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": make_state() | {"x": torch.zeros(1 << 22)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    packed = tmp_path / "folded.pth"
    kind = zipfile.ZIP_DEFLATED if request.param == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(packed, "w", kind) as archive:
        for name, content in parts.items():
            archive.writestr(name, content[:100] if request.param == "shared" else content)
    if request.param == "shared":  # the directory says that an entry is longer than the file
        raw = bytearray(packed.read_bytes())
        place = raw.rfind(b"PK\x01\x02")
        raw[place + 20 : place + 28] = (1 << 30).to_bytes(4, "little") * 2
        packed.write_bytes(bytes(raw))
    return packed


def test_archives_that_grow_when_they_are_read_are_refused(folded, tmp_path):
    assert folded.stat().st_size < 100_000
    with pytest.raises(WeightsError, match=r"folded.pth: is not read \((compressed|its entries are longer)"):
        weights.read(folded)
    assert checkpoints.damage(folded) in ("compressed, which torch never does", "its entries are longer than the file")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        setup.read_checkpoint(folded)


def test_files_of_torch_do_not_unfold(tmp_path):
    torch.save(make_state(), tmp_path / "w.pth")
    torch.save(make_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert unfolds(tmp_path / "w.pth") is None
    assert unfolds(tmp_path / "old.pth") is None
    assert set(weights.read(tmp_path / "old.pth")) == set(NET)
