"""The adapter of `transfgu.training`, whose saved case is not here: on a made-up case it gives what a plain loop gives.

The loop below shares no code with the method: network, losses, optimiser, restarts and scores are written out.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from tests.reference import framework

TABLE = framework.load_table()
PATCH, WIDTH, HEADS, GRID = 4, 12, 3, 3
DIM, DECODER_HEADS, CLASSES = 9, 3, 5


def weights(draw: torch.Generator) -> dict[str, torch.Tensor]:
    """A vision transformer of one block with DINO's names."""

    def normal(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=draw)

    vit = {
        "cls_token": normal(1, 1, WIDTH),
        "pos_embed": normal(1, 1 + GRID**2, WIDTH),
        "patch_embed.proj.weight": normal(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": normal(WIDTH),
        "norm.weight": 1 + normal(WIDTH),
        "norm.bias": normal(WIDTH),
    }
    return vit | {f"blocks.0.{name}": value for name, value in block(normal, WIDTH, 2 * WIDTH, qkv_bias=True).items()}


def block(normal, dim: int, hidden: int, qkv_bias: bool) -> dict[str, torch.Tensor]:
    shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    made = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()}
    made |= {f"{name}.bias": normal(shape[0]) for name, shape in shapes.items() if qkv_bias or name != "attn.qkv"}
    for name in ("norm1", "norm2"):
        made |= {f"{name}.weight": 1 + normal(dim), f"{name}.bias": normal(dim)}
    return made


def decoder(draw: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=draw)

    made = {
        "proj_dec.weight": normal(DIM, WIDTH),
        "proj_dec.bias": normal(DIM),
        "cls_emb": normal(1, CLASSES, DIM),
        "proj_patch": normal(DIM, DIM),
        "proj_classes": normal(DIM, DIM),
    }
    for name, size in (("decoder_norm", DIM), ("mask_norm", CLASSES)):
        made |= {f"{name}.weight": 1 + normal(size), f"{name}.bias": normal(size)}
    for number in range(2):
        made |= {f"blocks.{number}.{name}": value for name, value in block(normal, DIM, 2 * DIM, False).items()}
    return made


def run_block(x: torch.Tensor, w: dict[str, torch.Tensor], prefix: str, heads: int, eps: float) -> torch.Tensor:
    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        bias = w.get(f"{prefix}{name}.bias")
        return value @ w[f"{prefix}{name}.weight"].T + (0 if bias is None else bias)

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(value, value.shape[-1:], w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"], eps)

    batch, tokens, dim = x.shape
    q, k, v = linear("attn.qkv", norm("norm1", x)).view(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-1, -2) * (dim // heads) ** -0.5).softmax(-1)
    x = x + linear("attn.proj", (attention @ v).transpose(1, 2).reshape(batch, tokens, dim))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


@torch.no_grad()
def patches(images: torch.Tensor, w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[int, int]]:
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    size = tuple(x.shape[-2:])
    places = w["pos_embed"][:, 1:].mT.reshape(1, WIDTH, GRID, GRID)
    if size != (GRID, GRID):  # DINO's rule
        scale = tuple((side + 0.1) / GRID for side in size)
        places = F.interpolate(places, scale_factor=scale, mode="bicubic")
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    x = x + torch.cat([w["pos_embed"][:, :1], places.flatten(2).mT], 1)
    x = run_block(x, w, "blocks.0.", HEADS, 1e-6)
    return F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 1:], size


def decode(tokens: torch.Tensor, w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    x = tokens @ w["proj_dec.weight"].T + w["proj_dec.bias"]
    x = torch.cat([x, w["cls_emb"].expand(len(x), -1, -1)], 1)
    for number in range(2):
        x = run_block(x, w, f"blocks.{number}.", DECODER_HEADS, 1e-5)
    x = F.layer_norm(x, (DIM,), w["decoder_norm.weight"], w["decoder_norm.bias"])
    unit = F.normalize(x[:, :-CLASSES] @ w["proj_patch"], dim=-1)
    vectors = F.normalize(x[:, -CLASSES:] @ w["proj_classes"], dim=-1)
    logits = F.layer_norm(unit @ vectors.mT, (CLASSES,), w["mask_norm.weight"], w["mask_norm.bias"])
    return logits.mT, vectors  # [B,K,hw]


def scores(case: dict, w: dict[str, torch.Tensor], vit: dict[str, torch.Tensor]) -> np.ndarray:
    images = torch.from_numpy(case["in_val_images"]).float() / 255
    tokens, size = patches((images - 0.4) / 0.3, vit)
    logits = decode(tokens, w)[0].detach().unflatten(2, size)
    found = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False).argmax(1).numpy()
    counts = np.zeros((CLASSES, CLASSES))
    for cluster, label in zip(found.ravel(), case["in_val_labels"].ravel(), strict=True):
        if label < CLASSES:
            counts[cluster, label] += 1
    rows, columns = linear_sum_assignment(-counts)
    hits = counts[rows, columns]
    union = counts.sum(1)[rows] + counts.sum(0)[columns] - hits
    present = union > 0
    return 100 * np.array([(hits[present] / union[present]).mean(), hits.sum() / counts.sum()])


def made_case(things: bool, **settings) -> dict[str, np.ndarray]:
    draw = torch.Generator().manual_seed(7)
    numpy = np.random.default_rng(7)
    steps, batch, side = 8, 2, GRID * PATCH
    concepts = CLASSES - int(things)
    maps = torch.rand(steps, batch, concepts, GRID, GRID, generator=draw)
    maps[1, 0] = 0.0  # a picture without evidence
    case = {
        "in_views": torch.rand(steps, batch, 3, side, side, generator=draw).numpy(),
        "in_maps": maps.numpy(),
        "in_permutations": np.stack([numpy.permutation(CLASSES) for _ in range(4)]),
        "in_permutation_steps": np.arange(4, 8),
        "in_mean": np.full(3, 0.4, np.float32),
        "in_std": np.full(3, 0.3, np.float32),
        "in_val_images": numpy.integers(0, 256, (2, 3, 2 * side, 2 * side), dtype=np.uint8),
        "in_val_labels": numpy.integers(0, CLASSES, (2, 2 * side, 2 * side), dtype=np.uint8),
        "cfg_heads": np.array(HEADS),
    }
    case["in_val_labels"][:, :3] = 255
    case |= {f"cfg_{name}": np.array(value) for name, value in settings.items()}
    case |= {f"in_vit__{name}": value.numpy() for name, value in weights(draw).items()}
    return case | {f"in_initial__decoder.{name}": value.numpy() for name, value in decoder(draw).items()}


def plain_loop(case: dict[str, np.ndarray], lr: float, decay: float, things: bool) -> dict[str, np.ndarray]:
    """Two steps an epoch; from epoch 2 on, every 2 epochs, the student teaches and starts anew."""

    def given(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): torch.from_numpy(v.copy()) for k, v in case.items() if k.startswith(prefix)}

    vit, initial = given("in_vit__"), given("in_initial__decoder.")
    student = {name: value.clone().requires_grad_() for name, value in initial.items()}
    decayed, free = ([v for v in student.values() if (v.dim() > 1) == many] for many in (True, False))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    teacher, since = None, 0
    rows: dict[str, list[float]] = {name: [] for name in ("cross_entropy", "uncertainty", "diversity", "total")}
    after, results = [], {}
    for step in range(8):
        epoch = step // 2
        if step % 2 == 0:
            since += 1
            if epoch >= 2 and epoch % 2 == 0:
                teacher, since = {name: value.detach().clone() for name, value in student.items()}, 0
                for name, value in student.items():
                    value.data.copy_(initial[name])
        tokens, _ = patches((torch.from_numpy(case["in_views"][step]) - 0.4) / 0.3, vit)
        logits, vectors = decode(tokens, student)
        maps = torch.from_numpy(case["in_maps"][step]).flatten(2)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        soft = (maps - low) / (high - low)  # not a number where nothing is found
        evident = soft.amax(1) > 0.1
        if things:
            soft = torch.cat([F.relu(0.1 - soft.amax(1, keepdim=True)), soft], 1)
        if teacher is not None:
            soft = 0.5 * decode(tokens, teacher)[0].softmax(1) + 0.5 * soft
        soft = soft.nan_to_num(0.0) if teacher is None else torch.where(soft.isnan(), 0.0, soft)
        cross = F.cross_entropy(logits, soft.argmax(1))
        if teacher is not None:
            permutation = torch.from_numpy(case["in_permutations"][step - 4])
            cross = cross - (0.03 + 0.01 * since) * F.cross_entropy(logits, soft[:, permutation].argmax(1))
        top = (logits[:, 1:] if things else logits).softmax(1).sort(1, descending=True).values
        unsure = 1 - (top[:, 0] - top[:, 1])
        unsure = unsure[evident].mean() if things else unsure.mean()
        pairs = [1 + (vectors[:, i] * vectors[:, j]).sum(1) for i, j in itertools.combinations(range(CLASSES), 2)]
        apart = torch.stack(pairs).mean()
        total = cross + 0.3 * unsure + apart
        optimizer.zero_grad()
        total.backward()
        for value in student.values():
            value.grad.clamp_(-1, 1)
        if step == 0:
            results |= {f"out_grad0__decoder.{name}": value.grad.clone().numpy() for name, value in student.items()}
        optimizer.step()
        for name, value in zip(rows, (cross, unsure, apart, total), strict=True):
            rows[name].append(value.item())
        after.append({name: value.detach().clone() for name, value in student.items()})
    results |= {f"out_{name}": np.array(values) for name, values in rows.items()}
    chosen = [after[step] for step in (3, 4, 7)]
    results |= {f"out_after__decoder.{n}": torch.stack([row[n] for row in chosen]).numpy() for n in student}
    results |= {f"out_after__teacher.{name}": value[None].numpy() for name, value in teacher.items()}
    return results | {"out_after_steps": np.array([3, 4, 7]), "out_scores": scores(case, student, vit)}


@pytest.mark.train
@pytest.mark.parametrize("things", [False, True], ids=["things and stuff", "background"])
def test_the_adapter_gives_what_a_plain_loop_gives(things, tmp_path):
    """Restart, teacher, clamped gradients, decay of matrices alone, permutation, a picture without evidence."""
    case = made_case(things, lr=3e-3, weight_decay=0.05, steps_per_epoch=2, epochs=4, interval=2, start=2)
    expected = plain_loop(case, 3e-3, 0.05, things)
    assert abs(expected["out_grad0__decoder.proj_classes"]).max() > 0
    np.savez(tmp_path / "transfgu.training.0.npz", **case, **expected)
    line = framework.replay(tmp_path / "transfgu.training.0.npz", TABLE)
    assert line.status == "ok", line
    for name, change in (("out_after__teacher.cls_emb", 1e-2), ("out_cross_entropy", 1e-3)):
        wrong = expected | {name: expected[name] + change * abs(expected[name]).max()}
        np.savez(tmp_path / "transfgu.training.0.npz", **case, **wrong)
    assert framework.replay(tmp_path / "transfgu.training.0.npz", TABLE).status == "FAIL"


def test_values_that_a_case_does_not_name_are_the_released_ones():
    from tests.reference import transfgu

    words = transfgu._words(made_case(False, epochs=4), CLASSES)
    assert {"optim.decoder.lr=0.0001", "optim.decoder.weight_decay=0.0005", "method.restarts.epoch=2"} <= set(words)
    assert {"method.restarts.intervals=[2]", "method.restarts.start=2", "method.weights.uncertainty=0.3"} <= set(words)
