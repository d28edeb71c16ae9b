"""What each figure shows. `FIGURES`: a function for every method, by its name."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from common.chance import numpy_generator
from common.spec import IGNORE
from datamodules.base.regions import RegionPlan, provide
from docs.figures import drawing
from docs.figures.dinosaur import dinosaur
from docs.figures.drawing import Cell, Grid
from docs.figures.named_objects import comus, maskdistill
from docs.figures.objects import maskcontrast
from docs.figures.representations import leopart
from docs.figures.runs import FOLDER, staged, trained, untrained
from docs.figures.shared import (
    TRAIN,
    VAL,
    classes_of,
    codes_of_clusters,
    looked_at,
    of_stage,
    pair,
    read,
    regions,
)
from docs.figures.slotcon import slotcon
from docs.figures.slots import acseg
from evaluation import readout
from evaluation.instances import Detections, boxes_of
from grouping import spectral
from grouping.regions import over_segment
from lightning_modules.detection.training import Objects
from lightning_modules.families.graph_cuts import patch_features
from lightning_modules.patch_pairs.places import cut_picture, draw_pairs
from losses.concept_contrast import nearest
from losses.pseudo_labels import majority
from losses.smoothness import soft_labels
from models.scratch.ordered import past_mask, reading
from models.vit.masking import block_masks
from pseudo_labels.views import Segments, Shades, Soft, Strongest


def kmeans_baseline() -> Grid:
    """Features, their clusters, and those of colours."""
    deep = trained("kmeans_baseline", "trainer.max_steps=1")
    colour = trained("kmeans_baseline", "trainer.max_steps=1", "method.features=colour", name="kmeans_baseline_colours")
    batch = deep.batch("val", VAL)
    codes, _ = read(deep, batch["image"])
    maps = [codes_of_clusters(seen, batch["image"]) for seen in (deep, colour)]
    grid = Grid(["picture", "features\n(3 components)", "clusters of\nfeatures", "clusters of\ncolours", "truth"])
    for row, features in enumerate(drawing.components(codes)):
        clusters = [drawing.truth(own[row], deep.meta) for own in maps]
        grid.rows.append([*pair(deep, batch, row, features, *clusters)])
    return grid


def hidden_positives() -> Grid:
    """Positives of a patch in its own and in another picture, of both kinds, and its neighbourhood."""
    seen = trained("hidden_positives")
    columns = ["the patch", "agnostic,\nsame picture", "agnostic,\nanother", "specific,\nsame picture"]
    grid = Grid([*columns, "specific,\nanother", "its\nneighbours"])
    batch, places = seen.batch("train", list(range(8))), ((0, 0.66, 0.3), (1, 0.3, 0.6), (4, 0.8, 0.5))
    for row, down, along in places:
        order = [row, *(i for i in range(8) if i != row)]
        pictures = [looked_at(seen, batch["image"][i]) for i in order]
        found = {item.name: item.maps for item in seen.model.relations(pictures, (down, along))}
        shown = [drawing.picture(item.image) for item in pictures]
        side = len(shown[0])
        cells = [Cell(shown[0], (along * side, down * side))]
        for kind in ("agnostic", "specific"):
            masks = found[f"positives_{kind}"]
            most = max(range(1, len(masks)), key=lambda i, masks=masks: int(masks[i].sum()))
            cells += [drawing.lit(shown[i], masks[i]) for i in (0, most)]
        cells.append(drawing.shades(found["neighbourhood"][0].nan_to_num(0.0)))
        grid.rows.append(cells)
    return grid


def stego() -> Grid:
    """Cosines of a patch to its own, a near and another picture, of features and of codes."""
    seen = trained("stego")
    index, other, down, along = 0, 20, 0.28, 0.5
    pooled = [seen.model.features(seen.batch("train", [i])["image"]).concat().mean((2, 3))[0] for i in range(60)]
    unit = F.normalize(torch.stack(pooled), dim=1)
    near = int((unit @ unit[index]).topk(2).indices[1])
    batch = seen.batch("train", [index, near, other])
    features = seen.model.features(batch["image"])
    codes = seen.model.embed(features)
    grid = Grid(["the picture", "a near picture", "another picture"])
    shown = [drawing.picture(image) for image in batch["image"]]
    grid.rows.append([Cell(shown[0], (along * len(shown[0]), down * len(shown[0]))), *shown[1:]])
    for maps in (features.concat(), codes):
        rows = F.normalize(maps, dim=1)
        row, column = int(down * rows.shape[2]), int(along * rows.shape[3])
        cosines = torch.einsum("d,bdhw->bhw", rows[0, :, row, column], rows)
        grid.rows.append([drawing.shades(own, 0.0, 1.0) for own in cosines])
    return grid


def smooseg() -> Grid:
    """Cosines of a patch, of features and of soft labels, and the labels of the teacher."""
    seen = trained("smooseg")
    batch = seen.batch("val", VAL)
    with torch.inference_mode():
        features = seen.model.features(batch["image"])
        own = seen.model.read(batch["image"])[1]["own"]
    labels = soft_labels(own, seen.cfg.method.temperature)
    classes = classes_of("own", seen, own, batch["image"])
    columns = ["the patch", "cosines of\nfeatures", "cosines of\nsoft labels", "labels of\nthe teacher", "truth"]
    grid = Grid(columns)
    for row, (down, along) in enumerate([(0.75, 0.5), (0.2, 0.5), (0.8, 0.3)]):
        shown = drawing.picture(batch["image"][row])
        cells = [Cell(shown, (along * len(shown), down * len(shown)))]
        for maps in (features.concat(), labels):
            unit = F.normalize(maps[row], dim=0)
            patch = unit[:, int(down * unit.shape[1]), int(along * unit.shape[2])]
            cells.append(drawing.shades(torch.einsum("d,dhw->hw", patch, unit), 0.0, 1.0))
        grid.rows.append([*cells, *(drawing.truth(ids[row], seen.meta) for ids in (classes, batch["label"]))])
    return grid


def iic() -> Grid:
    """Pictures and their copies, and the classes of both heads."""
    small = ["data.train_size=64", "data.eval_size=64", "data.batch_size=8"]
    seen = trained("iic", "backbone=net10a", "backbone.create.widths=[16,32,64,64,128,128]", *small)
    batch = seen.views(TRAIN)
    with torch.inference_mode():
        features = seen.model.features(batch["image"])
        over = seen.model.head_a(features.concat(), tuple(batch["image"].shape[-2:]))[0]
        classes = classes_of("own", seen, seen.model.scores(features), batch["image"])
    grid = Grid(["picture", "its copy", "classes of\nhead A", "classes of\nhead B", "truth"])
    for row, ids in enumerate(over.argmax(1)):
        shown = drawing.picture(batch["copy"][row]), drawing.ids(ids, over.shape[1])
        grid.rows.append(pair(seen, batch, row, *shown, drawing.truth(classes[row], seen.meta)))
    return grid


def eagle() -> Grid:
    """Eigenvectors of a picture's graph, the segments in them, and clusters of the codes."""
    seen = trained("eagle")
    batch = seen.batch("val", VAL)
    codes, _ = read(seen, batch["image"])
    with torch.no_grad():
        vectors = seen.model.vectors(batch["image"], {"positive": codes})["positive"]
        segments = seen.model.segments("positive", vectors)
    clusters = codes_of_clusters(seen, batch["image"])
    grid = Grid(["picture", "eigenvectors\n2, 3 and 4", "their\nsegments", "clusters of\ncodes", "truth"])
    for row, found in enumerate(drawing.components(vectors)):
        own = regions(segments[row], seen.cfg.method.cue.clusters)
        grid.rows.append([*pair(seen, batch, row, found, own, drawing.truth(clusters[row], seen.meta))])
    return grid


def autoregressive() -> Grid:
    """What a cell may see in two orders, and the classes of the picture in these and in no order."""
    seen = trained("autoregressive", "trainer.max_steps=100")
    batch, orders, (down, along) = seen.batch("val", VAL), (1, 5), (0.5, 0.5)
    classes, pasts = [], []
    for order in (*orders, 0):
        with torch.no_grad(), reading(seen.model.backbone.net, order):
            own = read(seen, batch["image"])[1]["own"]
        classes.append(classes_of("own", seen, own, batch["image"]))
        rows, columns = own.shape[-2:]
        if order:
            cell = int(down * rows) * columns + int(along * columns)
            pasts.append(past_mask(order, rows, columns)[cell].view(rows, columns))
    columns = [f"past of a cell\nin order {order}" for order in orders]
    columns += [f"classes in\norder {order}" for order in orders] + ["classes in\nno order", "truth"]
    grid = Grid(columns)
    for row, image in enumerate(batch["image"]):
        shown = drawing.picture(image)
        point = (along * len(shown), down * len(shown))
        cells = [Cell(drawing.lit(shown, past), point) for past in pasts]
        cells += [drawing.truth(found[row], seen.meta) for found in (*classes, batch["label"])]
        grid.rows.append(cells)
    return grid


def cause() -> Grid:
    """How alike the concepts of a patch and of others are, what that makes of them, and the prototypes' classes."""
    seen = trained("cause")
    batch = seen.batch("val", VAL)
    with torch.inference_mode():
        maps = seen.model.features(batch["image"]).concat()
        own = seen.model.read(batch["image"])[1]["own"]
    classes = classes_of("own", seen, own, batch["image"])
    concepts = nearest(maps.flatten(2).mT - seen.model.mean, seen.model.book).unflatten(1, maps.shape[2:])
    book = F.normalize(seen.model.book.detach(), dim=1)
    columns = ["the patch", "cosine of\nconcepts", "drawn\ntogether", "kept\napart", "classes of\nprototypes", "truth"]
    grid = Grid(columns)
    for row, (down, along) in enumerate([(0.75, 0.5), (0.2, 0.5), (0.8, 0.3)]):
        shown, ids = drawing.picture(batch["image"][row]), concepts[row]
        cosines = (book @ book[ids[int(down * ids.shape[0]), int(along * ids.shape[1])]])[ids]
        cells = [Cell(shown, (along * len(shown), down * len(shown))), drawing.shades(cosines, 0.0, 1.0)]
        cells += [drawing.lit(shown, mask) for mask in (cosines > seen.model.near, cosines < seen.cfg.method.far)]
        grid.rows.append([*cells, *(drawing.truth(found[row], seen.meta) for found in (classes, batch["label"]))])
    return grid


def dino() -> Grid:
    """Crops of a step, hidden patches, and features before and after the training of the bundled weights."""
    seen, random = untrained("dino", "backbone.weights=bundled"), untrained("dino", "backbone.weights=none")
    batch = seen.views(TRAIN)
    large = [batch[f"global{number}"] for number in (0, 1)]
    side, dense = large[0].shape[-1], seen.cfg.method.dense
    cells = side // seen.model.backbone.stride
    draw = numpy_generator(0, "figures.mask", 0)
    masks = block_masks(draw, len(TRAIN), (cells, cells), 1.0, tuple(dense.mask_share))
    maps = [drawing.components(own.model.features(batch["image"]).concat()) for own in (random, seen)]
    grid = Grid(
        ["picture", "a large\ncrop", "another", "what the\nstudent sees", "random\nfeatures", "the teacher's\nfeatures"]
    )
    for row in range(len(TRAIN)):
        crops = [drawing.picture(view[row]) for view in large]
        hidden = drawing.lit(crops[0], torch.from_numpy(~masks[row]))
        grid.rows.append([drawing.picture(batch["image"][row]), *crops, hidden, *(own[row] for own in maps)])
    return grid


def context_prediction() -> Grid:
    """Pairs of patches, whose direction is asked."""
    return patch_pairs("context_prediction")


def cooccurrence() -> Grid:
    """Pairs of patches: adjacent, or far."""
    return patch_pairs("cooccurrence")


def patch_pairs(method: str) -> Grid:
    """The pair of patches of a picture, in its colours and in what the network sees of it."""
    seen = untrained(method)
    model, batch = seen.model, seen.views(TRAIN)
    model.prepare(seen.data.loader)
    size, side = tuple(batch["image"].shape[-2:]), seen.cfg.method.side
    pairs = draw_pairs(seen.cfg.seed, 1, len(TRAIN), size, side, model.draw())
    shown = model.dropped(batch["recoloured"])
    both = [cut_picture(shown, place, side) for place in (pairs.centre, pairs.other)]
    grid = Grid(["picture", "what the\nnetwork sees", "the first\npatch", "the other\npatch"])
    for row in range(len(TRAIN)):
        (top, left), (down, along) = pairs.centre[row].tolist(), pairs.other[row].tolist()
        box, point = (left - side // 2, top - side // 2, left + side // 2, top + side // 2), (along, down)
        pictures = [Cell(drawing.picture(part[row]), point, box) for part in (batch["image"], shown)]
        grid.rows.append([*pictures, *(drawing.picture(patches[row]) for patches in both)])
    return grid


def segsort() -> Grid:
    """Contour regions, two windows of the picture with the same regions, and the codes of pixels."""
    seen = trained("segsort")
    data = seen.data
    data.regions = provide(
        RegionPlan("scenes-train", data.source("train"), seen.model.regions, over_segment, FOLDER / "regions", 0)
    )
    batch = seen.views(TRAIN)
    codes = drawing.components(read(seen, batch["image"])[0])
    grid = Grid(
        ["picture", "its contour\nregions", "a window", "its regions", "another", "its regions", "codes of\npixels"]
    )
    for row in range(len(TRAIN)):
        count = int(batch["regions"][row].max()) + 1
        cells = [drawing.picture(batch["image"][row]), regions(batch["regions"][row], count)]
        for name in ("view0", "view1"):
            cells += [drawing.picture(batch[name][row]), regions(batch[f"{name}.regions"][row], count)]
        grid.rows.append([*cells, codes[row]])
    return grid


def hsg() -> Grid:
    """The levels of the hierarchy of a picture."""
    seen = trained("hsg")
    batch = seen.batch("val", VAL)
    with torch.inference_mode():
        levels = seen.model.levels(batch["image"], batch["valid"])
    grid = Grid(["picture", "segments", "fine groups", "coarse groups", "truth"])
    for row in range(len(VAL)):
        grid.rows.append(pair(seen, batch, row, *(drawing.ids(level[row]) for level in levels)))
    return grid


def deep_spectral() -> Grid:
    """Eigenvectors, segments and pseudo-labels of training pictures."""
    seen = untrained("deep_spectral", "data.train_count=200")
    found = staged(seen)
    views = {f"eigenvector {number}": Shades(found["eigenvectors"], number - 1) for number in (2, 3, 4)}
    views |= {"segments": Segments(found["regions"], None, False), "pseudo-labels": seen.model.labels(found)}
    return of_stage(seen, views, {"pseudo-labels": seen.cfg.method.num_clusters})


def normalized_cut() -> Grid:
    """Cuts by colours and by features, and the classes of the regions."""
    seen = untrained("normalized_cut", "data.train_count=200")
    found = staged(seen)
    views = {}
    for kind, name in (("colour", "colours"), ("deep", "features")):
        views[f"{name}:\nsecond vector"] = Shades(found[f"eigenvectors_{kind}"], 1)
        views[f"{name}:\nsegments"] = Segments(found[f"regions_{kind}"], None, False)
    views["classes"] = seen.model.labels(found, "_deep")
    return of_stage(seen, views, {"classes": seen.cfg.method.num_clusters})


def tokencut() -> Grid:
    """The graph of a patch, the second eigenvector, its two sides and the object."""
    seen = untrained("tokencut")
    settings = seen.cfg.method
    batch = seen.batch("train", TRAIN)
    with torch.no_grad():
        maps = patch_features(seen.model.backbone, batch["image"])
        affinity = spectral.threshold_affinity(maps.flatten(2).mT, settings.tau, settings.eps, settings.binary)
        size = tuple(maps.shape[-2:])
        cut = spectral.token_cut(affinity, size, solver=settings.solver, side=settings.side)
        masks, boxes = seen.model.objects(batch["image"])
    grid = Grid(["picture", "joined to\nthe cross", "second\neigenvector", "its two\nsides", "the object", "truth"])
    for row in range(len(TRAIN)):
        shown = drawing.picture(batch["image"][row])
        scale, seed = len(shown) / size[0], int(cut.seeds[row])
        joined = drawing.lit(shown, affinity[row, seed].unflatten(0, size) > settings.eps)
        point = (seed % size[1] + 0.5) * scale, (seed // size[1] + 0.5) * scale
        found = Cell(drawing.lit(shown, masks[row]), box=boxes[row].tolist())
        cells = [Cell(joined, point), drawing.shades(cut.vectors[row]), drawing.ids(cut.bipartition[row].long()), found]
        grid.rows.append(pair(seen, batch, row, *cells))
    return grid


def primaps() -> Grid:
    """Principal masks, what the slow prototypes see, and the labels that the masks make of it."""
    seen = trained("primaps", "data.train_count=400", "trainer.max_steps=300")
    masks, count = Segments(staged(seen)["masks"], None), len(seen.meta.names)
    batch = seen.batch("train", TRAIN)
    size = tuple(batch["image"].shape[-2:])
    classes = classes_of("own", seen, read(seen, batch["image"])[1]["own"], batch["image"])
    grid = Grid(["picture", "principal\nmasks", "slow\nprototypes", "labels of\nthe masks", "truth"])
    for row, index in enumerate(TRAIN):
        ids = torch.from_numpy(masks.read(index, size)).long()
        inside = torch.where(ids == 0, IGNORE, ids)[None]
        labels = majority(inside, classes[row][None], count)[0]
        shown = (drawing.truth(part, seen.meta) for part in (classes[row], labels))
        grid.rows.append([*pair(seen, batch, row, drawing.ids(ids, int(ids.max()) + 1), *shown)])
    return grid


FEW_STEPS = (
    "trainer.max_steps=12", "data.batch_size=4", "method.kmeans.pictures=40", "method.kmeans.counted=4",
    "evaluation.kmeans.pictures=40",
)  # fmt: skip
"""Of a method that trains its backbone: enough for a picture of what it does."""


def picie() -> Grid:
    """Both views of a picture, and what the copy of the network makes of them in the frame that they share."""
    seen = trained("picie", *FEW_STEPS)
    views, count = seen.views(TRAIN), seen.cfg.method.num_clusters
    with torch.no_grad():
        labels = [seen.model.labels_of(views, number)[0] for number in range(2)]
        own = classes_of("own", seen, read(seen, views["image"])[1]["own"], views["image"])
    grid = Grid(["view 1", "its clusters", "view 2", "its clusters,\ncropped alike", "final clusters", "truth"])
    for row in range(len(TRAIN)):
        shown = [(drawing.picture(views[f"view{n + 1}"][row]), drawing.ids(labels[n][row], count)) for n in range(2)]
        ends = [drawing.truth(ids[row], seen.meta) for ids in (own, views["label"])]
        grid.rows.append([*shown[0], *shown[1], *ends])
    return grid


def mdc() -> Grid:
    """A view, its clusters, what the classifier of the epoch makes of it, and the final clusters."""
    seen = trained("mdc", *FEW_STEPS)
    views, count = seen.views(TRAIN), seen.cfg.method.num_clusters
    with torch.no_grad():
        (labels,) = seen.model.labels_of(views, 0)
        classes = seen.model.classifier_logits(seen.model.codes_of(views, "view1"), 0).argmax(1)
        own = classes_of("own", seen, read(seen, views["image"])[1]["own"], views["image"])
    grid = Grid(["the view", "its clusters", "its classifier", "picture", "final clusters", "truth"])
    for row in range(len(TRAIN)):
        shown = (drawing.ids(ids[row], count) for ids in (labels, classes))
        found = pair(seen, views, row, drawing.truth(own[row], seen.meta))
        grid.rows.append([drawing.picture(views["view1"][row]), *shown, *found])
    return grid


def transfgu() -> Grid:
    """Concept maps, the pseudo-labels that they make, and what the student learned of them."""
    seen = trained("transfgu")
    found, count = staged(seen), seen.cfg.method.num_clusters
    batch = seen.batch("train", TRAIN)
    own = readout.predict(read(seen, batch["image"])[1]["own"], tuple(batch["image"].shape[-2:]))
    views = {f"concept\nmap {rank + 1}": Strongest(found["maps"], rank) for rank in range(3)}
    views["pseudo-\nlabels"] = Soft(found["maps"])
    grid = of_stage(seen, views, {"pseudo-\nlabels": count})
    grid.columns = [*grid.columns[:-1], "the student", "truth"]
    for row, cells in enumerate(grid.rows):
        cells.insert(-1, drawing.ids(own[row], count))
    return grid


def cutler() -> Grid:
    """MaskCut's masks, what a detector taught by them made of these, what the last one finds, and the things."""
    words = ("data.train_count=100", "data.batch_size=4", "method.rounds.steps=120", "trainer.max_steps=60")
    seen = trained("cutler", *words, "method.rounds.sure=[0.5]")
    found, batch, source = staged(seen), seen.batch("train", TRAIN), seen.data.source("train")
    seen.model.load_state_dict(seen.checkpoint["state_dict"], strict=False)  # the stage has put the first detector in
    objects = seen.model.detections(batch["image"], batch["valid"])
    names = ["MaskCut", "after its\ndetector"]
    grid = of_stage(seen, {name: Objects(found[f"masks_{number}"]) for number, name in enumerate(names)}, {})
    grid.columns = [*grid.columns[:-1], "the last\ndetector", "things"]
    for cells, one, index in zip(grid.rows, objects, TRAIN, strict=True):
        sure = replace(one, masks=one.masks[:4], scores=one.scores[:4])
        things = torch.from_numpy(source.instances(index).masks)
        truth = Detections(things, boxes_of(things), torch.ones(len(things))).id_map()
        cells[-1:] = [drawing.ids(ids, int(ids.max()) + 1) for ids in (sure.id_map(), truth)]
    return grid


FIGURES: dict[str, Callable[[], Grid]] = {
    draw.__name__: draw
    for draw in (
        acseg, autoregressive, cause, comus, context_prediction, cooccurrence, cutler, deep_spectral, dino, dinosaur,
        eagle,
        hidden_positives, hsg, iic, kmeans_baseline, leopart, maskcontrast, maskdistill, mdc, normalized_cut, picie,
        primaps, segsort, slotcon, smooseg, stego, tokencut, transfgu,
    )
}  # fmt: skip
