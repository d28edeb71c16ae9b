"""The shared base: batches, orders across ranks and resumes, offline passes, views in training."""

import itertools
import logging
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from common.errors import ConfigError, DataError
from common.spec import Geometric, Photometric, ViewSpec
from datamodules.base.transforms import Geometry, Replay
from tests.datamodules.pictures import Stripes, StripesModule, config
from tests.support.ranks import on_two_ranks


def module(cls=StripesModule, **data) -> StripesModule:
    found = cls(config(**data))
    found.setup()
    return found


def make(**attributes) -> type:
    return type("Made", (StripesModule,), attributes)


def everything(loader) -> dict[str, torch.Tensor | list]:
    batches = list(loader)
    parts = {key: [batch[key] for batch in batches] for key in batches[0]}
    return {
        key: torch.cat(part) if torch.is_tensor(part[0]) else list(itertools.chain(*part))
        for key, part in parts.items()
    }


# ---- what a batch is ----


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_what_the_design_says(workers):
    batch = next(iter(module(workers=workers).train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert set(batch["label"].unique().tolist()) <= {0, 1, 2, 255}
    assert batch["valid"].dtype == torch.bool
    assert batch["valid"].all()
    assert batch["id"] == [f"p{i}" for i in batch["index"].tolist()]
    assert batch["size"].tolist() == [[20, 26]] * 4
    assert batch["broken"] == []
    assert (batch["image"][:, :, 0, 0] * 255 >= batch["index"][:, None] - 0.5).all()


def test_without_labels_there_is_no_label_key():
    found = module(make(train=Stripes(8, labels=False), names=()))
    assert "label" not in next(iter(found.train_dataloader()))
    assert not found.meta.has_labels


def test_keep_pads_right_and_below():
    class Mixed(Stripes):
        def read(self, index):
            image, label = super().read(index)
            return (image, label) if index % 2 else (image.transpose(1, 0, 2), label.T)

    found = make(val=Mixed(2))(config(eval_crop="keep", eval_size=10))
    found.pad_multiple = 8
    batch = next(iter(found.val_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["valid"].sum((1, 2)).tolist() == [130, 130]
    assert batch["valid"][0, :13, :10].all()
    assert batch["valid"][1, :10, :13].all()
    assert (batch["label"][~batch["valid"]] == 255).all()
    assert (batch["image"].transpose(0, 1)[:, ~batch["valid"]] == 0).all()


@pytest.mark.parametrize("crop", ["center", "random", "five", "keep"])
def test_the_same_on_any_number_of_workers_and_with_or_without_the_cache(crop):
    plain = everything(module(train_crop=crop, cache_mb=0).train_dataloader())
    for data in ({"workers": 2}, {"cache_mb": 1}, {"workers": 2, "cache_mb": 0.01}):
        loader = module(train_crop=crop, **data).train_dataloader()
        first = everything(loader)
        again = everything(loader)
        for key in ("image", "label", "index"):
            assert torch.equal(first[key], plain[key])
            assert torch.equal(again[key], plain[key])
    assert len(plain["id"]) == (88 if crop == "five" else 16)


def test_the_cache_reads_each_picture_once_and_keeps_to_its_room():
    class Counting(Stripes):
        reads = 0

        def read(self, index):
            Counting.reads += 1
            return super().read(index)

    loader = module(make(train=Counting(8)), cache_mb=1).train_dataloader()
    list(loader), list(loader)
    assert Counting.reads == 8
    one = 16 * 20 * 4 / 2**20
    small = module(make(train=Counting(8)), cache_mb=2.5 * one).train_dataloader()
    list(small)
    assert len(small.dataset.kept) == 2


def test_random_crops_differ_between_pictures_and_epochs():
    class Ramp(Stripes):
        def read(self, index):
            return np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (16, 200, 3)), None

    found = module(make(train=Ramp(8), names=()), flip_p=0.0, batch_size=8)
    data = found.dataset("train", found.train_geometry, "train", flip=True)
    left = {(epoch, i): int(data[epoch, i].image[0, 0, 0]) for epoch in range(3) for i in range(8)}
    assert len(set(left.values())) > 15
    assert left == {key: int(data[key].image[0, 0, 0]) for key in left}


def test_five_crops_multiply_the_items():
    found = module(train_crop="five")
    assert found.train_items == 90
    assert found.steps_per_epoch == 22
    item = found.dataset("train", found.train_geometry, "x")[0, 87]
    assert (item.index, item.id) == (87, "p17")


# ---- refusals ----


def test_a_batch_that_does_not_divide_over_the_devices(monkeypatch):
    monkeypatch.setattr("common.distributed.world_size", lambda: 3)
    with pytest.raises(ConfigError) as error:
        module().train_dataloader()
    assert str(error.value) == (
        "data.batch_size=4: the global batch is split evenly over 3 devices, so it must be a positive multiple of 3; "
        "set data.batch_size=3"
    )


def test_fewer_pictures_than_a_batch():
    with pytest.raises(DataError) as error:
        module(batch_size=20).train_dataloader()
    assert str(error.value) == (
        "data.batch_size=20: the training set has only 18 pictures and a batch takes each at most once; set "
        "data.batch_size=18 or less, or add pictures"
    )


def test_more_devices_than_validation_pictures(monkeypatch):
    monkeypatch.setattr("common.distributed.world_size", lambda: 6)
    with pytest.raises(DataError) as error:
        module().val_dataloader()
    assert str(error.value) == (
        "trainer.devices: the validation split has 5 pictures for 6 devices, and each needs at least one; use fewer "
        "devices or add pictures"
    )


def test_an_empty_evaluation_batch_is_refused():
    with pytest.raises(ConfigError) as error:
        module(eval_batch_size=0).val_dataloader()
    assert str(error.value) == "data.eval_batch_size=0: must be 1 or more pictures"


def test_accumulated_gradients_are_refused():
    found = module()
    found.trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=0)
    with pytest.raises(ConfigError, match=r"trainer\.accumulate_grad_batches=2: must be 1"):
        found.train_dataloader()


# ---- broken files ----


def test_a_broken_picture_is_replaced_the_same_way_each_time():
    found = [module(make(train=Stripes(18, broken=(3,))), workers=w) for w in (0, 2)]
    first, second = (everything(m.train_dataloader()) for m in found)
    assert first["id"] == second["id"]
    assert torch.equal(first["image"], second["image"])
    assert len(first["id"]) == 16
    assert "p3" not in first["id"]
    assert set(first["broken"]) <= {"p3.png: this file cannot be read as a picture (cut)"}


def test_offline_passes_replace_or_leave_out():
    found = module(make(train=Stripes(18, broken=(3,))))
    assert len(everything(found.loader("train", "train"))["id"]) == 18
    left = everything(found.loader("train", "eval"))
    assert left["id"] == [f"p{i}" for i in range(18) if i != 3]
    assert len(left["broken"]) == 1


# ---- offline passes ----


def test_offline_passes_are_deterministic_and_keyed():
    found = module()
    one, two = (everything(found.loader("train", "train", "shuffled", purpose="pool")) for _ in range(2))
    other = everything(found.loader("train", "train", "shuffled", purpose="fit"))
    assert one["id"] == two["id"]
    assert torch.equal(one["image"], two["image"])
    assert sorted(one["id"]) == sorted(other["id"])
    assert one["id"] != other["id"]
    assert everything(found.loader("val"))["id"] == [f"p{i}" for i in range(5)]
    assert len(everything(found.loader("train", "train", limit=40, repeat=True))["id"]) == 40
    assert [len(b["id"]) for b in found.loader("val", batch_size=3)] == [3, 2]


def test_offline_passes_take_other_sources_and_geometries():
    batch = next(iter(module().loader(Stripes(3), Geometry(size=(8, 12), crop="none"), batch_size=3)))
    assert batch["image"].shape == (3, 3, 8, 12)
    with pytest.raises(ValueError, match="'train', 'eval' or a Geometry"):
        module().loader("val", "evaluation")


# ---- ranks ----


def _as_rank(rank):
    found = module(make(train=Stripes(18, broken=(2, 7)), val=Stripes(5)), max_broken=0.9)
    found.views = {"v": ViewSpec(Photometric(), Geometric())}
    found.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=6, training=True, num_devices=2)
    batch = found.on_after_batch_transfer(next(iter(found.train_dataloader())), 0)
    result = {
        "train": [{key: batch[key].numpy() for key in ("image", "index", "v", "v.label")}],
        "val": everything(found.val_dataloader())["id"],
        "offline": everything(found.loader("train", "train", "shuffled"))["id"],
    }
    found.sync_broken()
    result["broken"] = sorted(found.broken["train"].files)
    account = found.broken["val"]
    account.share = 0.0
    account.add({f"{rank}{i}.png": "cut" for i in range(2)})  # two on each rank, four together
    try:
        found.sync_broken()
    except DataError as error:
        result["stopped"] = str(error)
    return result


@pytest.mark.ddp
def test_two_processes_see_what_one_sees():
    ranks = on_two_ranks(_as_rank, start="fork")

    one = module(make(train=Stripes(18, broken=(2, 7)), val=Stripes(5)), max_broken=0.9)
    one.views = {"v": ViewSpec(Photometric(), Geometric())}
    one.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=6, training=True, num_devices=1)
    whole = one.on_after_batch_transfer(next(iter(one.train_dataloader())), 0)
    for key in ("image", "index", "v", "v.label"):
        joined = np.concatenate([ranks[r]["train"][0][key] for r in range(2)])
        np.testing.assert_allclose(joined, whole[key].numpy(), atol=1e-6)
    assert ranks[0]["val"] == ["p0", "p2", "p4"]
    assert ranks[1]["val"] == ["p1", "p3"]
    offline = everything(one.loader("train", "train", "shuffled"))["id"]
    assert ranks[0]["offline"] + ranks[1]["offline"] == offline
    for rank in range(2):
        assert ranks[rank]["broken"] == ["p2.png", "p7.png"]
        assert ranks[rank]["stopped"] == (
            "4 of the 5 pictures of 'val' cannot be read, more than data.max_broken=0 allows; mend or remove them, or "
            "raise data.max_broken: cut; cut; cut"
        )


# ---- training, killed and resumed ----


class Recorder(L.LightningModule):
    """Writes down what each step sees; dies in the step `die`."""

    def __init__(self, die=None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.die = die
        self.seen, self.ends, self.scored = [], [], []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.die:
            raise InterruptedError("killed")
        sums = [round(batch[key].sum().item(), 3) for key in ("image", "v")]
        self.seen.append((self.global_step, self.current_epoch, batch_idx, *batch["id"], *sums))
        return self.layer(batch["v"].mean((2, 3))).mean()

    def validation_step(self, batch, batch_idx):
        assert "v" not in batch

    def on_validation_epoch_end(self):
        self.scored.append(self.global_step)

    def on_train_epoch_end(self):
        self.ends.append(self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder, die=None, checkpoint=None, workers=0, **settings):
    recorder, data = Recorder(die), module(workers=workers)
    data.views = {"v": ViewSpec(Photometric())}
    trainer = L.Trainer(
        logger=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        **settings,
    )
    try:
        trainer.fit(recorder, data, ckpt_path=checkpoint)
    except InterruptedError:
        assert die is not None
    return recorder, trainer


RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 10, "max_epochs": -1},
    "steps_val_every": {"max_steps": 10, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "short_epochs": {"max_steps": 10, "max_epochs": -1, "limit_train_batches": 3},
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory", "ignore:.*treespec")
@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in RUNS), ("steps_val_every", 1)])
def test_a_killed_run_goes_on_with_the_next_batch(tmp_path, kind, workers, recwarn):
    """Four steps an epoch; killed inside the first, at the end of the first, and inside the second epoch."""
    settings = RUNS[kind]
    whole, whole_trainer = train(tmp_path / "whole", workers=workers, **settings)
    assert len(whole.seen) == (12 if "max_steps" not in settings else 10)
    for killed in (2, 4, 7):
        first, _ = train(tmp_path / f"{killed}", die=killed, workers=workers, **settings)
        assert len(first.seen) == killed
        rest, trainer = train(
            tmp_path / "rest", checkpoint=tmp_path / f"{killed}" / f"step={killed}.ckpt", workers=workers, **settings
        )
        assert first.seen + rest.seen == whole.seen
        assert trainer.current_epoch == whole_trainer.current_epoch
        assert len(first.ends + rest.ends) == len(whole.ends)
        assert first.scored + rest.scored == whole.scored
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_a_resume_on_other_data_is_noticed(tmp_path, caplog):
    state = module().train_dataloader().state_dict()
    other = module(make(train=Stripes(30))).train_dataloader()
    module().train_dataloader().load_state_dict(state)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert caplog.records[0].getMessage() == (
        "The training set had 18 items in 4 batches when this run was stopped and has 30 in 7 now: the run goes on "
        "with other batches than it would have seen"
    )


def test_views_carry_params_in_training():
    found = module()
    found.views = {"v": ViewSpec(geometric=Geometric(size=8))}
    found.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, training=True)
    batch = found.on_after_batch_transfer(next(iter(found.train_dataloader())), 0)
    assert isinstance(batch["v.params"], Replay)
    assert batch["v"].shape == (4, 3, 8, 8)
    assert batch["v.label"].shape == batch["v.valid"].shape == (4, 8, 8)
