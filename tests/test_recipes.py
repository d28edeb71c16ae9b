"""No published recipe is dead: one step of each on a made-up tree in the official layout, and the line that `list`
prints of it."""

import re
from pathlib import Path

import pytest

import config
from engine import training
from tests.datamodules import trees
from tests.datamodules.pictures import noise, save

TREES = {
    "cocostuff27": trees.coco, "cityscapes27": trees.cityscapes, "potsdam3": trees.potsdam, "pascal_voc": trees.voc,
    "kitti": trees.kitti_step, "camvid": trees.camvid, "cocostuff171": trees.coco, "coco81": trees.coco,
    "lip": trees.lip, "coco_instances": trees.coco_instances,
}  # fmt: skip
EVERY_RUN = {"hidden_positives_cityscapes27_vits8", "stego_potsdam3_vits8"}
"""Recipes that `make test` runs; `make test-slow` runs the others."""

SMALL = [
    "trainer=cpu", "trainer.max_steps=1", "trainer.progress=none", "data.batch_size=2", "data.eval_batch_size=2",
    "data.workers=0", "data.train_size=112", "data.eval_size=112", "backbone.weights=none", "backbone.create.depth=2",
    "evaluation.panels=1", "evaluation.kmeans.restarts=1", "evaluation.kmeans.iterations=2",
]  # fmt: skip
OF_METHOD = {
    "hidden_positives": ["method.pool.size=8", "backbone.precision=float32"],
    "stego": ["method.neighbours.stored=3", "method.neighbours.drawn=2"],
    "segsort": ["method.crop.size=48", "method.head.hidden=32", "evaluation.retrieval.pictures=4"],
    "hsg": ["method.crop.size=48", "method.head.hidden=32", "evaluation.retrieval.pictures=4"],
    "deep_spectral": [
        "method.stage.size=112",
        "method.eigs.k=4",
        "method.segments.count=3",
        "method.segments.restarts=1",
        "method.num_clusters=4",
        "method.head.hidden=16",
        "backbone.levels=[0,1]",
    ],
    "primaps": [
        "method.stage.size=112",
        "method.stage.batch_size=2",
        "method.stage.shard=2",
        "method.start.steps=0",
    ],
    "tokencut": ["method.stage.size=112"],
    "transfgu": [
        "method.stage.size=112",
        "method.stage.batch_size=1",
        "method.stage.shard=2",
        "method.crops.max_per_image=300",
        "method.crops.zoom=3",
        "method.augment.size=56",
        "method.decoder.dim=24",
        "method.restarts.repeat=1",
    ],
    "cutler": [
        "method.masks.provider=spectral",
        "method.stage.size=112",
        "method.stage.batch_size=2",
        "method.stage.shard=2",
        "method.rounds.steps=1",
        "method.detector.width=16",
        "method.detector.hidden=16",
        "method.detector.mask_width=16",
        "method.detector.proposals=16",
        "method.detector.test_proposals=16",
        "method.detector.boxes=8",
        "method.detector.most=4",
    ],
    "comus": [
        "method.stage.size=112",
        "method.objects.size=56",
        "method.objects.min_area=1",
        "method.num_clusters=3",
        "method.graph.neighbours=2",
        "trainer.max_steps=5",  # one for the first round
        "method.head.hidden=16",
    ],
    "maskdistill": [
        "method.stage.size=112",
        "method.num_clusters=3",
        "method.head.hidden=16",
        "trainer.max_steps=2",
    ],
    "context_prediction": ["backbone.create.widths=[8,8,8,8,8,8]", "method.head.channels=8", "method.head.hidden=8"],
    "cooccurrence": ["backbone.create.widths=[8,8,8,8,8,8]", "method.head.channels=8", "method.head.hidden=8"],
    "eagle": ["method.blocks=2"],
    "cause": ["method.concepts=32", "method.bank=8"],
    "picie": ["method.view_size=56"],
    "mdc": ["method.view_size=56"],
    "autoregressive": ["backbone.create.width=4"],
    "maskcontrast": [
        "method.masks.provider=spectral",
        "method.stage.size=112",
        "method.stage.shard=2",
        "method.queue.size=4",
        "method.augment.size=64",
        "method.head.hidden=16",
        "evaluation.posthoc.epochs=1",
    ],
    "dinosaur": [
        "method.num_clusters=3",
        "method.slots=4",
        "method.slot_dim=16",
        "method.decoder.mlp.hidden=[16]",
        "method.decoder.transformer.layers=1",
    ],
    "iic": ["method.over_clusters=9", "method.half_side=2"],
    "slotcon": ["method.crops.size=64", "method.head.hidden=16", "method.dim=8"],
    "leopart": [
        "method.prototypes=12",
        "method.head.hidden=16",
        "method.crops.global_size=64",
        "method.crops.local_size=32",
        "method.queue.size=8",
        "evaluation.fcn.epochs=1",
        "evaluation.fcn.channels=8",
        "evaluation.fcn.size=null",
        "evaluation.overcluster.k=[3]",
        "evaluation.cbfe.clusters=4",
        "evaluation.cbfe.train_pictures=2",
        "evaluation.communities.clusters=3",
        "evaluation.posthoc.epochs=1",
    ],
    "dino": ["method.head.out_dim=64", "method.crops.local_count=2", "data.train_size=128"],
}

"""What makes the other sizes of a method small, where it has any."""

WHOLE = (
    "resnet18", "resnet50", "dino_resnet50", "moco_v2_resnet50", "resnet101", "selfpatch_vits16", "tiny", "net10a",
    "ordered",
)  # fmt: skip
"""Backbones whose depth is not set here: they have none, their file lists the arguments that may be given, or they are
small and read at late blocks."""


def folder(root: Path) -> Path:
    for i in range(4):
        save(root / "images" / "train" / f"{i}.png", noise(150, 140, seed=i))
    save(root / "images" / "val" / "0.png", noise(150, 140, seed=9))
    return root


@pytest.mark.train
@pytest.mark.parametrize(
    "name",
    [name if name in EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in config.names("experiment")],
)
def test_one_step(name, tmp_path):
    words = config.load_group("experiment", name)["words"]
    if words["data"] == "scenes":
        data = ["data.train_count=4", "data.val_count=2"]
    else:
        data = [f"data.root={TREES.get(words['data'], folder)(tmp_path / 'tree')}"]
    size = [word for word in SMALL if "depth" not in word or words["backbone"] not in WHOLE]
    run = [f"experiment={name}", f"run.dir={tmp_path}", "run.name=r", *size, *OF_METHOD.get(words["method"], []), *data]
    run += ["data.batch_size=1"] if name.endswith("cocostuff3") else []  # its list has one picture in the tree
    metrics = training.train(config.compose(run))
    assert metrics["method"] == words["method"]
    wanted = "val/cluster/entropy" if words["data"] == "folder" else "val/cluster/miou"
    assert metrics[wanted] is not None
    crf = config.compose(run).evaluation.crf
    assert ("val/cluster_crf/miou" in metrics) == (crf == "dense")


@pytest.mark.parametrize("name", config.names("experiment"))
def test_pictures_of_a_recipe_are_whole_patches(name):
    """`test_one_step` has sizes of its own; a transformer refuses others than multiples of its patches."""
    cfg = config.compose([f"experiment={name}"])
    patch = re.search(r"patch(\d+)", cfg.backbone.timm)
    multiple = cfg.backbone.create.get("patch_size") or (int(patch[1]) if patch else 1)
    for key in ("train_size", "eval_size"):
        sides = cfg.data[key]
        assert not [side for side in ([sides] if isinstance(sides, int) else sides) if side % multiple], key


def test_every_recipe_names_its_figure_and_its_source():
    for name in config.names("experiment"):
        facts = config.load_group("experiment", name)["figure"]
        assert set(facts) == {"reach", "source", "here"}, name
        assert (facts["source"] == "-") == (facts["reach"] == "none is published"), name


def test_the_line_of_a_recipe():
    assert config.figure("hidden_positives_cocostuff27_vits8") == (
        "to reach: cluster_crf 57.2 acc / 24.6 mIoU, linear_crf 75.6 acc / 42.7 mIoU "
        "(HP, CVPR 2023, tables 1 to 3); not run here"
    )
    assert config.figure("dino_small_data") == "to reach: none is published; not run here"


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("hidden_positives")])
def test_recipes_of_hidden_positives_hold_the_released_values(name):
    """The settings of the release (hynnsk/HP), row by row."""
    cfg = config.compose([f"experiment={name}", "data.root=x", "backbone.weights=none"])
    method, optim = cfg.method, cfg.optim
    found = [method.dim, method.temperature, method.alpha, method.rho, method.pool.size, method.pool.renew_every]
    found += [method.ema, method.lambda_warmup, cfg.trainer.max_epochs, cfg.trainer.val_every]
    assert (
        found
        == {
            "cocostuff27": [512, 0.8, 0.05, 0.02, 2048, 100, 0.99, 1000, 3, 100],
            "cityscapes27": [512, 0.6, 0.05, 0.02, 2048, 20, 0.999, 50, 30, 100],
            "potsdam3": [256, 0.4, 0.0, 1.0, 1024, 20, 0.999, 100, 10, 50],
        }[cfg.data.name]
    )
    assert (cfg.data.batch_size, cfg.evaluation.cluster_init, cfg.evaluation.flip) == (64, "normal", False)
    assert (optim.head.lr, optim.head.weight_decay, optim.head.clip_norm) == (5e-4, 0.1, 10.0)
    assert (optim.projection.lr, optim.linear_probe.lr, optim.cluster_probe.lr) == (5e-4, 1e-3, 5e-3)
    assert (method.loss_version, method.reweighting, method.lhp.sigma) == ("1", True, 28.0)
    assert method.denominator == "agnostic"


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("transfgu")])
def test_recipes_of_transfgu_hold_the_released_values(name):
    """The standard ViT-S/8 of DINO, resizing and crops of its loaders, and its choice of the best after every epoch."""
    cfg = config.compose([f"experiment={name}", "data.root=x"])
    coco = cfg.data.name.startswith("coco")
    assert (cfg.backbone.name, cfg.backbone.weights) == ("dino_vits8", "hub")
    assert (cfg.data.interpolation, cfg.method.stage.interpolation) == (
        "bilinear_plain",
        "nearest_corner" if coco else None,
    )
    assert (cfg.method.augment.draw, list(cfg.method.augment.sides)) == ("tenths", [0.4, 0.9])
    assert cfg.evaluation.select == "own_sum"
    epochs = {"pascal_voc": 100, "cityscapes27": 50, "lip": 100}.get(cfg.data.name, 200)
    pictures = {"pascal_voc": 20 * 1464, "cityscapes27": 20 * 2975, "lip": 30462}.get(cfg.data.name, 118287)
    pictures = 49629 if "curated" in name else pictures
    epoch = pictures // cfg.data.batch_size
    assert cfg.trainer.val_every == epoch
    assert cfg.trainer.max_epochs == epochs or cfg.trainer.max_steps == epochs * epoch
    assert cfg.method.restarts.epoch in (None, epoch)


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("smooseg")])
def test_recipes_of_smooseg_hold_the_released_values(name):
    """The settings of the release (mc-lan/SmooSeg): one set, but for the two shifts."""
    cfg = config.compose([f"experiment={name}", "data.root=x", "backbone.weights=none"])
    method, optim = cfg.method, cfg.optim
    shifts = {"cocostuff27": (-0.02, 0.48), "cityscapes27": (-0.02, 0.5), "potsdam3": (0.1, 0.5)}
    assert (method.terms.within.shift, method.terms.across.shift) == shifts[cfg.data.name]
    assert (method.dim, method.temperature, method.ema, method.dropout.p, method.partners) == (
        64,
        0.1,
        0.998,
        0.2,
        "shifted",
    )
    assert (optim.head.optimizer, optim.head.lr, optim.prototypes.lr, optim.head.weight_decay) == (
        "adam",
        1e-4,
        5e-4,
        0,
    )
    assert (cfg.data.batch_size, cfg.trainer.max_steps, cfg.data.train_size) == (32, 3000, 224)


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("slotcon")])
def test_recipes_of_slotcon_hold_the_released_values(name):
    """Those of the release's scripts (CVMI-Lab/SlotCon); its epochs of COCO have 231 steps, of ImageNet 2502."""
    cfg = config.compose([f"experiment={name}", "data.root=x"])
    method, epoch = cfg.method, 2502 if "imagenet" in name else 231
    assert (cfg.backbone.weights, cfg.backbone.frozen, cfg.backbone.output_stride) == ("none", False, None)
    prototypes = {"slotcon_coco_resnet50": 256, "slotcon_imagenet_resnet50": 2048, "slotcon_cocostuff27_resnet50": 27}
    assert (method.prototypes, method.dim, method.head.hidden, method.head.norm) == (
        prototypes[name],
        256,
        4096,
        "batch",
    )
    assert (method.momentum, method.centre_momentum, method.grouping_weight) == (0.99, 0.9, 0.5)
    assert (method.temperature.student, method.temperature.teacher, method.contrast.temperature) == (0.1, 0.07, 0.2)
    assert (method.crops.size, list(method.crops.scale), method.crops.overlap) == (224, [0.08, 1.0], 0.01)
    assert (list(method.augment.blur_p), list(method.augment.solarize_p)) == ([1.0, 0.1], [0.0, 0.2])
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (512, 200 if "imagenet" in name else 800)
    for group in (cfg.optim.head, cfg.optim.backbone):
        assert (group.optimizer, group.lr, group.lr_end, group.weight_decay) == ("lars", 2.0, 1e-6, 1e-5)
        assert (group.momentum, group.schedule, group.warmup, group.warmup_from) == (0.9, "cosine", 5 * epoch, 0.01)


@pytest.mark.parametrize(
    "name",
    [name for name in config.names("experiment") if name.startswith(("picie", "mdc")) and name.endswith("resnet18")],
)
def test_recipes_of_picie_and_mdc_hold_the_released_values(name):
    """Scripts and paper: a trained ResNet-18, ten epochs, views of 320 px out of pictures of 640."""
    cfg = config.compose([f"experiment={name}", "data.root=x"])
    method, kmeans, coco = cfg.method, cfg.method.kmeans, cfg.data.name == "cocostuff27"
    assert (cfg.backbone.name, cfg.backbone.weights, cfg.backbone.frozen) == ("resnet18", "hub", False)
    assert list(cfg.backbone.levels) == [-4, -3, -2, -1]
    assert (cfg.data.batch_size, cfg.data.train_size, cfg.data.eval_size, method.view_size) == (128, 640, 320, 320)
    assert (cfg.data.train_crop, cfg.data.interpolation) == ("center", "bilinear")
    assert {group.lr for key, group in cfg.optim.items() if "probe" not in key} == {1e-4 if coco else 1e-3}
    assert (method.weights, method.dim, cfg.trainer.max_epochs, cfg.trainer.max_steps) == (
        "proportional",
        128,
        10,
        None,
    )
    first = 30 if method.name == "mdc" and not coco else 20
    assert (kmeans.batch_size, kmeans.first, kmeans.group, kmeans.iterations) == (256, first, 1, 20)
    assert (kmeans.init, kmeans.pictures, kmeans.counted, kmeans.fresh) == ("random", None, None, None)
    assert (method.augment.whole_cells, list(method.augment.sides), method.augment.gray_p) == (True, [0.5, 1.0], 0)
    assert cfg.data.train_list == "curated7" if coco else cfg.data.split == ("fine" if "fine" in name else "picie")
    heads = {"picie_h_cocostuff27_resnet18": [27, 100], "picie_h_cocostuff15_resnet18": [15, 100]}
    assert method.get("heads") == heads.get(name)


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("cause")])
def test_recipes_of_cause_hold_the_released_values(name):
    """Both leaks of labels, the slip of the heads and the lengths of the release, in every phase."""
    cfg = config.compose([f"experiment={name}", "data.root=x", "backbone.weights=none"])
    method, optim, wide = cfg.method, cfg.optim, cfg.method.head == "tr"
    crops = {"cocostuff27": 5 * 97_702, "cityscapes27": 5 * 2_975, "pascal_voc": 50 * 1_464}
    epoch = -(-crops.get(cfg.data.name, 20 * 97_702) // 64)
    phases = config.plain(cfg)["phases"]
    assert [(part["method.phase"], part["share"]) for part in phases] == [
        ("book", 1),
        ("head", 2),
        ("prototypes", 5 if wide else 1),
    ]
    assert cfg.trainer.max_steps == epoch * sum(part["share"] for part in phases)
    assert (method.dim, method.projection_dim, method.concepts, method.cell, method.bank) == (90, 2048, 2048, 4, 100)
    assert (method.prototypes, method.clipping, method.start, method.centre) == ("labels", "joint", "uniform", False)
    assert (method.temperature, method.near, method.far, method.ema, method.dropout) == (0.07, 0.3, 0.1, 0.99, 0.1)
    assert {group.lr for name, group in optim.items() if name != "cluster_probe"} == {4e-3}
    assert cfg.backbone.create.get("num_heads") == (None if "vitb" in name else 12)
    sizes = [part.get("data.train_size", cfg.data.train_size) for part in phases]
    assert sizes == ([320] * 3 if wide else [320, 224, 224])
    clips = {"cocostuff27": 2.0 if wide else 0.1, "cityscapes27": 1.0}
    assert optim.head.clip_norm == clips.get(cfg.data.name)


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("stego")])
def test_recipes_of_stego_choose_as_released(name):
    """The best of every 400 steps, of Potsdam of every epoch (4,545 blocks in batches of 16)."""
    cfg = config.compose([f"experiment={name}", "data.root=x", "backbone.weights=none"])
    assert cfg.trainer.val_every == (4545 // 16 if cfg.data.name == "potsdam3" else 400)
    assert (cfg.evaluation.flip, cfg.evaluation.crf, cfg.trainer.max_steps) == (True, "dense", 5000)


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("eagle")])
def test_recipes_of_eagle_hold_the_released_values(name):
    """Those of the two released configurations, and what its code does without a setting."""
    cfg = config.compose([f"experiment={name}", "data.root=x", "backbone.weights=none"])
    method, optim, released = (
        cfg.method,
        cfg.optim,
        "cityscapes27" if cfg.data.name == "cityscapes27" else "cocostuff27",
    )
    found = [cfg.data.batch_size, cfg.trainer.max_steps, method.objects.start, method.objects.share, method.samples]
    found += [method.terms.positive, method.terms.negative, method.shift.bias, method.cue.clusters]
    found += [method.objects.smoothing, optim.cue.lr, optim.linear_probe.lr, optim.cluster_probe.lr]
    assert (
        found
        == {
            "cocostuff27": [64, 10_000, 200, 0.9, 11, 0.25, 0.63, 0.0, 32, 0.0, 5e-5, 1e-3, 5e-3],
            "cityscapes27": [32, 6_000, 380, 0.7, 28, 0.18, 1.0, 0.11, 28, 0.1, 5e-4, 5e-3, 3e-3],
        }[released]
    )
    assert (method.dim, method.blocks, method.cue.vectors, method.shift.scale, method.negatives.repeats) == (
        512, 3, 4, 3.5, 5,
    )  # fmt: skip
    assert (method.cue.colour, method.cue.sign, method.cue.scope) == ("released", "picture", "batch")
    assert (method.objects.prototypes, method.objects.temperature, method.objects.across) == ("medoid", 0.07, 0.7)
    assert (method.zero_clamp, method.stabilize, method.pointwise, method.blur_p) == (True, True, True, 0.5)
    assert (optim.head.lr, optim.projection.lr, cfg.evaluation.extra) == (5e-4, 5e-4, "stego_compat")


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("autoregressive")])
def test_recipes_of_the_autoregressive_method_hold_the_reproductions_values(name):
    """One network of four blocks at stride 4, and a rate for each data set; no changes of colour or place."""
    cfg = config.compose([f"experiment={name}", "data.root=x"])
    create, potsdam = cfg.backbone.create, cfg.data.name == "potsdam3"
    assert (create.width, create.blocks, create.stem_stride, create.attention_after) == (64, 4, 2, 0)
    rates = {("potsdam3", 3): 1e-6, ("potsdam3", 6): 1e-6, ("cocostuff27", 3): 4e-5, ("cocostuff27", 15): 6e-6}
    assert cfg.optim.network.lr == rates[cfg.data.name, cfg.data.classes]
    assert (cfg.method.orders, cfg.method.shift, cfg.method.normalised) == ("independent", 10, False)
    assert (cfg.data.batch_size, cfg.data.train_size, cfg.data.eval_size) == (
        (20, 200, 200) if potsdam else (30, 128, 128)
    )
    assert (cfg.data.train_crop, cfg.data.eval_crop, cfg.data.flip_p, cfg.trainer.max_epochs) == ("none", "none", 0, 20)


def test_published_figures_are_those_of_the_metrics():
    assert config.published("hidden_positives_cocostuff27_vits8") == {
        "cluster_crf/acc": 57.2, "cluster_crf/miou": 24.6, "linear_crf/acc": 75.6, "linear_crf/miou": 42.7,
    }  # fmt: skip
    assert config.published("stego_potsdam3_vits8") == {"cluster_crf/acc": 77.0}
    assert config.published("dino_tiny") == {}
    for name in config.names("experiment"):
        for key, value in config.published(name).items():
            probe = r"cluster|kmeans|own|regions|overcluster_\d+|linear|linear_posthoc|fcn|cbfe|communities|retrieval"
            assert re.fullmatch(rf"({probe})(_crf)?/(acc|miou)", key), name
            assert 0 < value < 100, name


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("acseg")])
def test_recipes_of_acseg_hold_what_the_paper_says(name):
    """There is no release; what it does not say is assumed in one way for both."""
    cfg = config.compose([f"experiment={name}", "data.root=x"])
    generator, regions, voc = cfg.method.generator, cfg.method.regions, cfg.data.name == "pascal_voc"
    assert (generator.concepts, generator.layers, cfg.trainer.max_steps, cfg.method.centred) == (5, 6, 2500, False)
    assert (regions.vectors, cfg.method.background.score) == ("crop", "class" if voc else "none")
    assert (cfg.backbone.name, cfg.backbone.levels, cfg.backbone.cache_features) == ("dino_vits16", None, True)


@pytest.mark.parametrize("name", [name for name in config.names("experiment") if name.startswith("maskcontrast")])
def test_recipes_of_maskcontrast_hold_the_released_values(name):
    """The settings of the release (wvangansbeke/Unsupervised-Semantic-Segmentation), without and with supervision."""
    cfg = config.compose([f"experiment={name}", "data.root=x", "backbone.weights=none"])
    method, head, taught = cfg.method, cfg.optim.head, "moco" not in name
    assert (cfg.data.batch_size, method.queue.size) == ((64, 128) if taught else (128, 256))
    assert list(method.freeze) == (["conv1", "bn1", "layer1", "layer2"] if taught else [])
    assert (method.dim, method.temperature, method.momentum, method.schedule_by) == (32, 0.5, 0.999, "epoch")
    assert (method.head.hidden, list(method.head.rates), method.head.dropout) == (256, [12, 24, 36], 0.5)
    assert cfg.optim.head == cfg.optim.backbone
    assert (head.optimizer, head.lr, head.weight_decay, head.schedule, head.power) == ("sgd", 4e-3, 1e-4, "poly", 0.9)
    assert (cfg.trainer.max_epochs, cfg.backbone.output_stride, method.augment.size) == (40, 8, 224)
    assert (cfg.evaluation.matching, cfg.evaluation.absent, method.own.split) == ("hungarian_iou", "zero", "val")
