"""Weight files of backbones: read without running code, unwrapped, and held against the network key by key.

A file never fits a little: every tensor of the network comes out of the file with its shape, or the file is refused
with the first key that differs. Nothing here replaces missing weights by random ones.
"""

import argparse
import hashlib
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import WeightsError
from common.formats.archives import unfolds
from models.pretrained.origins import fetch
from models.vit import positions

WRAPPERS = (
    "teacher", "target_encoder", "state_dict_ema", "model_ema", "student", "encoder_q", "base_encoder", "state_dict",
    "model_state_dict", "model", "encoder", "backbone", "network", "module",
)  # fmt: skip
"""Entries of a checkpoint that hold the network, and leading parts of its keys; the first in this list is preferred."""

HEADS = re.compile(
    r"(heads?|fc|classifier|projection|projectors?|predictor|prototypes?|masked_embed|mask_token"
    r"|decoder\w*|queue\w*|\w+_head)(\.|$)"
)
"""Keys of pre-training heads and the like, which no backbone uses. A key that the network owns is never dropped."""

LARGER = 4
"""Files of so many times the network's values (heads, a second network) are taken to float32 before they are compared;
of larger ones only what belongs to the network."""


@dataclass(frozen=True)
class Fitted:
    """Weights under the names of the network, float32, and what was left out of the file."""

    state: dict[str, Tensor]
    dropped: int
    prefix: str


def read(path: Path) -> Mapping[str, Any]:
    """The content of a .safetensors file, or of a .pth/.pt file without unpickling code.

    argparse.Namespace, a plain record that the full checkpoints of DINO and MoCo carry, is the one class let through.

    Raises:
        WeightsError: the file needs pickled code, is cut off, is of another format, or does not hold a mapping.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if folded := unfolds(path):
            raise WeightsError(f"backbone.weights={path}: is not read ({folded}); save it anew with torch.save")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error))
        if code:
            needed = code.group(1) or code.group(2)
            raise WeightsError(
                f"backbone.weights={path}: the file holds pickled code ({needed}), which is never run; "
                "save its state dict alone, best as .safetensors"
            ) from None
        raise unreadable(path) from None
    except WeightsError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise unreadable(path) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"backbone.weights={path}: expected a state dict, found {type(content).__name__}")
    return content


def unreadable(path: Path) -> WeightsError:
    return WeightsError(
        f"backbone.weights={path}: cannot be read as a .pth, .pt or .safetensors file (cut off, or of another format)"
    )


def download(tag: str, pretrained_cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The published weights of a timm tag, see `origins.fetch`. Raises WeightsError."""
    return read(fetch(tag, pretrained_cfg))


def unwrap(content: Mapping[str, Any], expected: Iterable[str]) -> tuple[dict[str, Tensor], int, str]:
    """The network inside a checkpoint: (tensors without the common prefix of their keys, number left out, the prefix).

    Nested entries ({'teacher': …}, {'state_dict': …}) are opened. The prefix (`module.`, `backbone.`, `encoder_q.` and
    their chains) is the one under which most names of the network are found; among equals (student and teacher) the
    order of WRAPPERS decides. Tensors outside it are left out.
    """
    while inner := _wrapped(content):
        content = content[inner]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    expected = set(expected)
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                found["".join(f"{part}." for part in parts[:cut])] += 1
    prefix = min(found, key=lambda p: (-found[p], _preference(p.split(".")), len(p)), default="")
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return state, len(tensors) - len(state), prefix


def _wrapped(content: Mapping[str, Any]) -> str | None:
    """The entry of a checkpoint that holds the network, or None if the tensors lie here."""
    mappings = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
    inner = {key: count for key, value in mappings.items() if (count := _tensors(value))}
    if not inner or max(inner.values()) <= sum(isinstance(value, Tensor) for value in content.values()):
        return None
    return min(inner, key=lambda key: (_preference([key]), -inner[key]))


def _tensors(content: Mapping[str, Any]) -> int:
    """Named tensors in a mapping and the mappings below it (optimiser states are numbered, so they do not count)."""
    return sum(
        1 if isinstance(value, Tensor) else _tensors(value) if isinstance(value, Mapping) else 0
        for key, value in content.items()
        if isinstance(key, str)
    )


def _preference(parts: Iterable[str]) -> int:
    return min((WRAPPERS.index(part) for part in parts if part in WRAPPERS), default=len(WRAPPERS))


def fit(
    content: Mapping[str, Any],
    expected: Mapping[str, torch.Size],
    *,
    source: str,
    network: str,
    unused: frozenset[str] = frozenset(),
    convert: Callable[[dict[str, Tensor]], Mapping[str, Any]] | None = None,
    grid: tuple[int, int] | None = None,
    prefix_rows: int = 1,
    rule: str = "timm",
) -> Fitted:
    """The tensors of a checkpoint under the network's names, all of them, in float32.

    Args:
        content: what `read` or `download` gave.
        expected: name -> shape of every tensor of the network.
        source: `backbone.weights=<…>`, for messages.
        network: timm name, for messages.
        unused: names of the full network that this backbone leaves out (classifier, last convolution).
        convert: timm's translation of the authors' names; taken where it leaves fewer differences.
        grid: patches (h, w) of the network's position embedding; one of another square grid is resampled to it.
        prefix_rows: rows of the position embedding that belong to no patch.
        rule: `backbone.pos_interp`.

    Raises:
        WeightsError: the first key that differs, its expected and found shape.
    """
    state, dropped, prefix = unwrap(content, expected)
    for key, value in state.items():
        _expect_stored(key, value, source)
    if sum(value.numel() for value in state.values()) <= LARGER * sum(shape.numel() for shape in expected.values()):
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if grid is not None and "pos_embed" in state:
        state["pos_embed"] = _on_grid(state["pos_embed"].float(), grid, prefix_rows, rule)
    candidates = [state]
    if convert is not None and _differences(_without_heads(state, expected, unused), expected):
        try:
            candidates.append(dict(convert(dict(state))))
        except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError, IndexError, TypeError):
            candidates = [state]  # not a file of the authors' naming: report it under its own names
    kept = [_without_heads(candidate, expected, unused) for candidate in candidates]
    best = min(kept, key=lambda candidate: len(_differences(candidate, expected)))
    dropped += max(len(state) - len(best), 0)
    for key in expected:  # counters that only training reads; older files do not have them
        if key.endswith("num_batches_tracked"):
            best.setdefault(key, torch.zeros((), dtype=torch.int64))
    differing = _differences(best, expected)
    if differing:
        key = differing[0]
        wanted = list(expected[key]) if key in expected else "no such key"
        found = list(best[key].shape) if key in best else "no such key"
        raise WeightsError(
            f"{source}: not the weights of {network}: first differing key {key}: expected {wanted}, found {found} "
            f"({len(differing)} keys differ, {len(expected)} expected); choose the file of backbone.timm={network}"
        )
    for key in expected:
        value = best[key] = best[key].float() if best[key].is_floating_point() else best[key]
        if not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise WeightsError(
                f"{source}: tensor {key} holds {count} of {value.numel()} values that are not finite (NaN, infinity); "
                "take an earlier file of the training that they come from"
            )
    return Fitted({key: best[key] for key in expected}, dropped, prefix)


def _expect_stored(key: str, value: Tensor, source: str) -> None:
    """Raises WeightsError for a tensor of more values than the file holds: a few bytes that are repeated in memory."""
    layout = value.layout == torch.strided and not value.is_quantized
    if not layout or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise WeightsError(
            f"{source}: tensor {key} of shape {list(value.shape)} is no plain array of values in the file; save a copy "
            "that is, as .clone().contiguous() makes it"
        )


def _without_heads(state: Mapping[str, Any], expected: Mapping[str, Any], unused: frozenset[str]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and (key in expected or not (key in unused or HEADS.match(key)))
    }


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    """Keys that are missing or of another shape, in the network's order, then keys that the network does not have."""
    wrong = [key for key, shape in expected.items() if key not in state or state[key].shape != shape]
    return wrong + [key for key in state if key not in expected]


def _on_grid(embedding: Tensor, grid: tuple[int, int], prefix_rows: int, rule: str) -> Tensor:
    if embedding.dim() != 3 or embedding.shape[1] == prefix_rows + grid[0] * grid[1]:
        return embedding
    square = positions.square_grid(embedding.shape[1], (prefix_rows, 1, 0))
    if square is None:
        return embedding
    prefix, side = square
    return positions.resample(embedding, (side, side), grid, prefix, rule)


def identity(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the sha256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def flat(key: str) -> str:
    """timm's feature networks may write `stages.0` as `stages_0`."""
    return key.replace(".", "_")
