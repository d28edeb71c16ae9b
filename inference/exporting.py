"""`run.py export`: backbone, head and centroids as one `torch.export` program, to be used without this project."""

import json
import logging
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import config
from common import about
from common.errors import ConfigError
from common.files import whole
from datamodules.base.resizing import INTERPOLATIONS
from datamodules.files import ranges
from engine import setup
from evaluation import readout
from inference import asked, naming
from lightning_modules.base import UnsupervisedSegmenter
from models.backbone import pads_by_size

log = logging.getLogger(__name__)

FACTS = "labelfree.json"
"""The file inside the program that says what it takes and what its clusters are called."""
LARGEST = 2048
"""Longest side of an exported program, px."""


class Segmenter(nn.Module):
    """Pictures float [1,3,H,W] in 0..1 -> score maps [1,K,H/p,W/p] of one probe: what `predict` upsamples."""

    def __init__(self, model: UnsupervisedSegmenter, probe: str) -> None:
        super().__init__()
        self.model = model
        self.flip = bool(model.cfg.evaluation.flip)
        model.wants_attention = False  # for training alone
        model.in_program = True
        self.register_buffer("centroids", naming.centroids(model, probe).clone())
        self.reduce = model.kmeans_probe.reduced if probe == "kmeans" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        codes = self.codes(images)
        if self.flip:
            codes = readout.flip_average(codes, self.codes(images.flip(-1)))
        return readout.dot_products(self.reduce(codes), self.centroids)

    def codes(self, images: Tensor) -> Tensor:
        return self.model.embed(self.model.features(images))


def export(checkpoint_path: Path, output: Path, tokens: list[str], names: str | None = None) -> dict[str, Any]:
    """Write the program into `output`, and in it what its use needs: those facts are returned (`labelfree.json`).

    H and W may be any multiples of `multiple` from `smallest` to `largest`. The program is checked against the model on
    a size that it was not traced with before it is kept. Raises ConfigError where the network cannot be exported.
    """
    asked.expect_program(output)
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    cfg = config.restore(checkpoint["labelfree"]["config"], tokens)
    if cfg.evaluation.crf != "none":
        raise ConfigError(f"evaluation.crf={cfg.evaluation.crf}: is no part of a program; set evaluation.crf=none")
    side = cfg.evaluation.window.size
    if side is not None:
        raise ConfigError(f"evaluation.window.size={side}: is no part of a program; set evaluation.window.size=null")
    model = setup.restore_model(checkpoint, cfg)
    probe = naming.choose_probe(cfg, model)
    legend = naming.legend_for(checkpoint_path, checkpoint, model, probe, names)
    facts = {
        **sizes(cfg, model),
        "value_range": ranges.kept(cfg.data),
        "probe": probe,
        "names": legend.names,
        "colours": [list(colour) for colour in legend.colours],
        "method": cfg.method.name,
        **({} if model.stands_on is None else {"stands_on": model.stands_on}),
        "backbone": model.backbone.fingerprint,
        "licence": model.backbone.licence,
        "made_with": about.signature(),
    }
    module = Segmenter(model, probe).eval().requires_grad_(False)
    fix_padding(module)
    program = traced(module, facts)
    if drop_unused(module, program):
        program = traced(module, facts)
    check(program, module, facts)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, content, extra_files={FACTS: json.dumps(facts, ensure_ascii=False)})
    except Exception as error:  # what can be traced cannot always be written
        raise refused(error) from error
    with whole(output) as temporary:
        temporary.write_bytes(content.getbuffer())
    log.info(
        "%s: %d clusters of probe %s, sides from %d to %d px in steps of %d",
        output, len(legend.names), probe, facts["smallest"], facts["largest"], facts["multiple"],
    )  # fmt: skip
    if model.scores_instances:
        log.warning("%s: objects one by one are no part of a program; `predict` writes them", output)
    return facts


def sizes(cfg: DictConfig, model: UnsupervisedSegmenter) -> dict[str, int | str]:
    """The shorter side that `predict` gives the network, Pillow's name for how it is resized to it (or the one that is
    nearest to it), and the range of the program."""
    size = cfg.predict.size or cfg.data.eval_size
    unit = model.backbone.unit
    return {
        "size": size if isinstance(size, int) else min(size),
        "interpolation": "bilinear" if INTERPOLATIONS[cfg.data.interpolation].bilinear else "nearest",
        "channels": model.backbone.in_channels,
        "multiple": unit,
        "smallest": 4 * unit,
        "largest": LARGEST // unit * unit,
    }


def traced(module: nn.Module, facts: dict[str, Any]) -> torch.export.ExportedProgram:
    """The program, for all sizes of the range. Raises ConfigError with the first line of what torch says."""
    unit, low, high = (facts[key] for key in ("multiple", "smallest", "largest"))
    rows, columns = (torch.export.Dim(name, min=low // unit, max=high // unit) for name in ("rows", "columns"))
    example = torch.rand(1, facts["channels"], 12 * unit, 17 * unit)  # unequal, and neither a border of the range
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own ways of tracing
            return torch.export.export(
                module, (example,), dynamic_shapes={"images": {2: unit * rows, 3: unit * columns}}, strict=False
            )
    except Exception as error:  # torch raises many kinds for what it cannot trace
        raise refused(error) from error


def drop_unused(module: nn.Module, program: torch.export.ExportedProgram) -> bool:
    """Take out of the module what a traced program never reads, such as teachers, banks and detectors, since all that a
    module holds is written into its file. Returns whether anything was taken out."""
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    unused = [name for node, name in held.items() if node not in read]
    for name in unused:
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        (part._parameters if leaf in part._parameters else part._buffers).pop(leaf)
    return bool(unused)


def refused(error: Exception) -> ConfigError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(f"export: this network cannot be exported by torch.export ({reason[:200]})")


def fix_padding(module: nn.Module) -> None:
    """TensorFlow's "same" padding follows from the size of a picture by arithmetic that torch.export cannot write. On
    whole cells it is a constant, which takes its place."""
    for parent in list(module.modules()):
        for name, conv in parent.named_children():
            if pads_by_size(conv):
                totals = [
                    max(0, (kernel - 1) * dilation + 1 - stride)
                    for kernel, stride, dilation in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
                ]
                sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
                plain = nn.Conv2d(
                    conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups,
                    conv.bias is not None,
                )  # fmt: skip
                plain.weight, plain.bias = conv.weight, conv.bias
                setattr(parent, name, nn.Sequential(nn.ZeroPad2d(sides), plain))


@torch.no_grad()
def check(program: torch.export.ExportedProgram, module: nn.Module, facts: dict[str, Any]) -> None:
    """Raises ConfigError where the program differs from the model on another size than it was traced on."""
    unit = facts["multiple"]
    image = torch.rand(1, facts["channels"], 21 * unit, 9 * unit, generator=torch.Generator().manual_seed(0))
    found, wanted = program.module()(image), module(image)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
        worst = "another shape" if found.shape != wanted.shape else f"{float((found - wanted).abs().max()):.2g}"
        raise ConfigError(
            f"export: the program differs from the model on another size (by {worst}); it was not written"
        )
