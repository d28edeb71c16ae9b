"""CAUSE's and ACSeg's modularity, and CAUSE's contrast, beside their plain formulations, in one run.

`python -m benchmarks.modularity [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

modularity: the loss of a book of M concepts, forward and backward, float32; the plain side holds M x P x P products for
each picture, as released. concepts: the same of the few concepts of a picture; the plain side holds P x P x M products
and what autograd keeps of them. contrast: one step against a bank; the plain side compares the concepts of all pairs of
patches by their vectors, as released, ours looks them up in the table of a frozen book.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Piece, run
from losses.concept_contrast import Likeness, concept_contrast, nearest
from losses.modularity import concept_modularity, modularity_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE, NEAR, FAR = 0.07, 0.3, 0.1


def _summed(loss: Tensor, leaf: Tensor) -> float:
    """After a backward pass: a number that holds loss and gradient."""
    loss.backward()
    return loss.item() + float(torch.linalg.vector_norm(leaf.grad))


# ------------------------------------------------------------------ modularity


def _graphs(pictures: int, patches: int, channels: int, concepts: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    vectors = torch.randn(pictures, patches, channels, generator=draws) + 0.3
    book = (torch.rand(concepts, channels, generator=draws) * 2 - 1 + 0.2) / concepts
    return vectors.to(DEVICE), book.to(DEVICE)


def modularity_ours(**sizes: int) -> Callable[[], float]:
    vectors, book = _graphs(**sizes)

    def step() -> float:
        leaf = book.detach().requires_grad_()
        return _summed(modularity_loss(vectors, leaf), leaf)

    return step


def modularity_plain(**sizes: int) -> Callable[[], float]:
    vectors, book = _graphs(**sizes)
    return lambda: _plain_modularity(vectors, book.detach().requires_grad_())


def _plain_modularity(vectors: Tensor, book: Tensor) -> float:
    unit = F.normalize(vectors, dim=2)
    edges = (unit @ unit.mT).clamp(min=0)
    edges = edges - torch.diag_embed(edges.diagonal(dim1=1, dim2=2))
    degrees = edges.sum(2, keepdim=True)
    total = degrees.sum((1, 2))[:, None, None]
    weights = edges - degrees @ degrees.mT / total
    likeness = (unit @ F.normalize(book, dim=1).T).clamp(min=0).mT
    pairs = torch.tanh(likeness[:, :, :, None] * likeness[:, :, None, :] / 0.1).amax(1)
    traces = (weights @ pairs).diagonal(dim1=1, dim2=2).sum(1)  # both are symmetric
    return _summed(-(traces / total.flatten()).mean(), book)


# ------------------------------------------------------------------ concepts of a picture


def _concepts(pictures: int, patches: int, channels: int, concepts: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    vectors = torch.randn(pictures, patches, channels, generator=draws) + 0.3
    return vectors.to(DEVICE), torch.randn(pictures, concepts, channels, generator=draws).to(DEVICE)


def concepts_ours(**sizes: int) -> Callable[[], float]:
    vectors, concepts = _concepts(**sizes)

    def step() -> float:
        leaf = concepts.detach().requires_grad_()
        return _summed(concept_modularity(vectors, leaf).mean(), leaf)

    return step


def concepts_plain(**sizes: int) -> Callable[[], float]:
    vectors, concepts = _concepts(**sizes)

    def step() -> float:
        leaf = concepts.detach().requires_grad_()
        unit = F.normalize(vectors, dim=2)
        edges = (unit @ unit.mT).clamp(min=0)
        degrees = edges.sum(2)
        total = degrees.sum(1)[:, None, None]
        weights = edges - degrees[:, :, None] * degrees[:, None] / total
        likeness = (unit @ F.normalize(leaf, dim=2).mT).clamp(min=0)
        together = (likeness[:, :, None] * likeness[:, None]).max(3).values
        return _summed(-(weights * together / total).sum((1, 2)).mean(), leaf)

    return step


# ------------------------------------------------------------------ contrast


def _step(pictures: int, patches: int, channels: int, concepts: int, wide: int, bank: int) -> tuple[Tensor, ...]:
    """Features [B,P,C], book [M,C], student and teacher projections [B,P,E], rows of a bank [N,E], their concepts."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(pictures, patches, channels, generator=draws)
    book = torch.randn(concepts, channels, generator=draws) + 0.3
    student, teacher = torch.randn(2, pictures, patches, wide, generator=draws)
    rows, of = torch.randn(bank, wide, generator=draws), torch.randint(concepts, (bank,), generator=draws)
    return tuple(part.to(DEVICE) for part in (features, book, student, teacher, rows, of))


def contrast_ours(**sizes: int) -> Callable[[], float]:
    features, book, student, teacher, rows, of = _step(**sizes)
    likeness = Likeness.of(book, NEAR, FAR)

    def step() -> float:
        leaf = student.detach().requires_grad_()
        own = nearest(features, book)
        sides = [(teacher.flatten(0, 1), own.flatten(), 0), (rows, of, None)]
        terms = [concept_contrast(leaf, own, *side[:2], likeness, TEMPERATURE, first=side[2])[0] for side in sides]
        return _summed(torch.cat(terms).mean(), leaf)

    return step


def contrast_plain(**sizes: int) -> Callable[[], float]:
    features, book, student, teacher, rows, of = _step(**sizes)

    def step() -> float:
        leaf = student.detach().requires_grad_()
        unit = F.normalize(book, dim=1)
        z, t, kept = (F.normalize(part, dim=-1) for part in (leaf, teacher.flatten(0, 1), rows))
        of_batch = unit[(F.normalize(features, dim=2) @ unit.T).argmax(-1)]
        terms = []
        for number, (anchors, own) in enumerate(zip(z, of_batch, strict=True)):
            first = number * len(anchors)
            terms.append(_plain_term(anchors, own, t, of_batch.flatten(0, 1), first))
            terms.append(_plain_term(anchors, own, kept, unit[of], None))
        return _summed(torch.stack(terms).mean(), leaf)

    return step


def _plain_term(anchors: Tensor, own: Tensor, rows: Tensor, of: Tensor, first: int | None) -> Tensor:
    alike = own @ of.T
    positive, negative = (alike > NEAR).float(), (alike < FAR).float()
    if first is not None:
        place = torch.arange(len(anchors), device=anchors.device)
        positive[place, first + place] = 0
    logits = anchors @ rows.T / TEMPERATURE
    logits = logits - logits.amax(1, keepdim=True).detach()
    spread = ((logits.exp() * (positive + negative)).sum(1, keepdim=True)).log()
    return ((spread - logits) * positive).sum() / positive.sum()


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the sizes that are asked for or at tiny ones."""
    graph = {"pictures": 2, "patches": 100, "channels": 384, "concepts": 1024}
    few = {"pictures": 4, "patches": 784, "channels": 384, "concepts": 5}
    step = {"pictures": 16, "patches": 49, "channels": 384, "concepts": 2048, "wide": 256, "bank": 20000}
    if quick:
        graph |= {"patches": 12, "channels": 8, "concepts": 16}
        few |= {"pictures": 2, "patches": 10, "channels": 8}
        step |= {"pictures": 2, "patches": 9, "channels": 8, "concepts": 16, "wide": 8, "bank": 40}
    module = "benchmarks.modularity"
    sizes = f"{graph['pictures']} x {graph['patches']}, {graph['concepts']} concepts"
    chosen = [
        Piece(f"modularity, {sizes}", module, "modularity_plain", "modularity_ours", graph, 5.0, 5.0),
        Piece("concepts, 4 x 784, 5 of each picture", module, "concepts_plain", "concepts_ours", few, 1.0, 5.0),
        Piece(f"contrast, bank of {step['bank']}", module, "contrast_plain", "contrast_ours", step, 1.0, 1.0),
    ]
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("modularity", __doc__, pieces, "modularity, concepts, contrast", words)


if __name__ == "__main__":
    sys.exit(main())
