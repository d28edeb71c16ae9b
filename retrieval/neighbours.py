"""Which training pictures are near which: STEGO's table of nearest neighbours, one row a training item.

A picture is the spatial mean of its frozen patch features, normalised; the search is exact, in blocks, and shared by
the ranks. The table is a function of backbone and pictures alone, so it is computed once and kept on disk under a
fingerprint of both. Source: STEGO (ICLR 2022), precompute_knns.py.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.files import whole
from retrieval import search

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file and of how the table is made; part of the fingerprint."""
BLOCK_ROWS = 16384
"""Pictures that are searched for at a time."""


def pooled(maps: Tensor) -> Tensor:
    """Unit vectors of pictures: the spatial mean of maps [B,C,h,w], L2-normalised; [B,C] float32, detached."""
    return F.normalize(maps.detach().float().mean(dim=(2, 3)), dim=1)


def nearest_pictures(vectors: Tensor, k: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines [Q,k] and rows [Q,k] of the k nearest of the unit vectors [N,C], best first; k is clamped to N.

    queries [Q,C] default to the vectors themselves, each of which then finds itself first (up to copies of it).
    """
    parts = [search.nearest(part, vectors, k) for part in (vectors if queries is None else queries).split(BLOCK_ROWS)]
    if not parts:
        return search.nearest(vectors[:0], vectors, k)
    return torch.cat([scores for scores, _ in parts]), torch.cat([ids for _, ids in parts])


def near_others(vectors: Tensor, groups: Tensor, k: int, rows: slice) -> Tensor:
    """The k nearest of the unit vectors [N,C] that are of another group, for those in `rows`: int64 [rows,k].

    groups int64 [N]: a row's own number where only the row itself is left out, the number of its picture where all
    crops of that picture are. Where fewer than k are left they repeat in order; a row without any names itself.
    """
    mine, own = vectors[rows], groups[rows]
    if not len(mine):
        return torch.empty(0, k, dtype=torch.int64, device=vectors.device)
    largest = int(torch.unique(groups, return_counts=True)[1].max())
    ids = nearest_pictures(vectors, k + largest, mine)[1]
    other = groups[ids] != own[:, None]
    ids = ids.gather(1, other.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
    left = other.sum(1, keepdim=True)
    place = torch.arange(k, device=ids.device) % left.clamp(min=1)
    itself = torch.arange(len(vectors), device=ids.device)[rows]
    return torch.where(left > 0, ids.gather(1, place), itself[:, None])


def table(vectors: Tensor, items: Tensor, total: int, k: int, per_picture: int = 1) -> Tensor:
    """The table of `total` training items from the vectors that this rank made: int64 [total,k], equal on all ranks.

    vectors [n,C] unit rows and items int64 [n], the training item of each; n may differ between ranks. Each rank
    searches its share. An item without a vector (an unreadable file) names itself, and is named by no other.
    per_picture: items of one picture, which must not be each other's neighbours (5 for five crops); 1 leaves out the
    item alone. A collective: all ranks must call it.
    """
    items, vectors = distributed.gather_uneven(items.to(vectors.device)), distributed.gather_uneven(vectors)
    share = len(items) * distributed.rank() // distributed.world_size()
    end = len(items) * (distributed.rank() + 1) // distributed.world_size()
    found = distributed.gather_uneven(near_others(vectors, items // per_picture, k, slice(share, end)))
    whole_table = torch.arange(total, device=items.device)[:, None].repeat(1, k)
    whole_table[items] = items[found]
    return whole_table.cpu()


def fingerprint(**facts: Any) -> str:
    """A name for the table that these facts (plain values) lead to: hexadecimal, 16 digits."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached(folder: Path, name: str, make: Callable[[], Tensor]) -> Tensor:
    """The table called `name` (its fingerprint) from `folder`, or what `make` gives, which is then kept there.

    Rank 0 reads and writes; all ranks get its table. A file that is cut or holds another fingerprint is made anew. A
    folder that cannot be written to is a warning: the run needs the table, not the file.
    """
    path = folder / f"{name}.npz"
    stored = _read(path, name) if distributed.rank() == 0 else None
    shape = distributed.broadcast(_on_device(torch.tensor([0, 0] if stored is None else list(stored.shape))))
    if bool(shape[0]):
        kept = stored if stored is not None else torch.empty(shape.tolist(), dtype=torch.int64)
        return distributed.broadcast(_on_device(kept)).cpu()
    made = make()
    if distributed.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as temporary, temporary.open("wb") as handle:
                np.savez(handle, neighbours=made.numpy().astype(np.int32), fingerprint=np.array(name))
            log.info("table of neighbours: %d x %d, kept in %s", *made.shape, path)
        except OSError as error:
            log.warning("cache.dir=%s: the table of neighbours cannot be kept (%s)", folder, error.strerror)
    return made


def _read(path: Path, name: str) -> Tensor | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["fingerprint"]) == name and file["neighbours"].ndim == 2:
                return torch.from_numpy(file["neighbours"].astype(np.int64))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # numpy and zipfile raise several kinds for cut and foreign files
        log.warning("%s cannot be read (%s); the table is made anew", path, type(error).__name__)
    return None


def _on_device(tensor: Tensor) -> Tensor:
    """Where collectives of this process group work: NCCL has none for the CPU."""
    nccl = distributed.active() and torch.distributed.get_backend() == "nccl"
    return tensor.cuda() if nccl else tensor
