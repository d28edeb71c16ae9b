"""`run.py weights`: where a backbone's weights come from, under which terms, whether they are here, and are they right.

Sizes and sums are those of the file that is here, or of the hub where there is a network; none is kept by hand but
`backbone.sha256`, for files that no hub has. timm, and torch with it, is imported where a network is asked for.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import config
from common.errors import WeightsError
from models.pretrained import origins

CHUNK = 1 << 22


@dataclass(frozen=True)
class Origin:
    """Where the weights of a configuration come from."""

    network: str
    licence: str
    published: int
    """Trained numbers of the network as it is published."""
    numbers: int
    """Those without its classifier, which no backbone uses."""
    hub_id: str | None
    """Repository on the Hugging Face hub, for `weights: hub`."""
    url: str | None
    """The address that timm names beside it, or in its place."""
    hub_names: tuple[str, ...]
    """Names that the file may have there."""
    published_file: str | None
    """What to get where a file has to be named."""
    file: Path | None
    """The file that is here."""
    sha256: str | None
    """What its sum has to be, where that is known."""
    place: str
    """Where it belongs."""
    record: dict[str, Any]
    """What timm knows of the tag."""


def origin(cfg: DictConfig) -> Origin:
    """Of the keys of `configs/backbone/*.yaml`. Nothing is downloaded. Raises ConfigError for an unknown network."""
    from models.backbone import outline

    record, published, numbers = outline(cfg)
    known = cfg.get("sha256")
    hub_id = url = None
    file = here(cfg, record)
    if cfg.weights == "hub":
        hub_id, url = record.get("hf_hub_id") or None, record.get("url") or None
        known = known or named_sum(file)
        place = f"{hub_cache()} (HF_HOME moves it)" if hub_id else str(origins.address_folder())
    elif cfg.weights == "bundled":
        place = "comes with this project"
    elif cfg.weights == "none":
        place = "nowhere: random and seeded"
    else:
        place = "anywhere; name it with backbone.weights=<file>"
        if file is not None:
            known = known if file.name == str(cfg.get("published_file")).split(" ")[0] else None
    return Origin(
        cfg.timm, licence_of(cfg) or record.get("license") or "unknown", published, numbers, hub_id, url,
        origins.hub_names(record), cfg.get("published_file"), file, known, place, record,
    )  # fmt: skip


def licence_of(cfg: DictConfig) -> str | None:
    """What the configuration says of the licence; None where timm's card says it."""
    return {"none": "none (random weights)", "bundled": "that of this project"}.get(cfg.weights) or cfg.licence


def here(cfg: DictConfig, record: dict[str, Any]) -> Path | None:
    """The file of the weights on this machine; None without. `record`: what timm knows of the tag.

    Raises WeightsError for a file that is named and missing.
    """
    if cfg.weights == "hub":
        return origins.cached(record)
    return None if cfg.weights in (None, "none") else Path(origins.locate(cfg.weights, cfg.name, None))


def taught(cfg: DictConfig) -> str:
    """What a preset's weights have learnt, in words."""
    if cfg.weights == "none":
        return "random weights, to be trained on your own pictures"
    return cfg.get("pretraining") or "see models/pretrained/bundled"


def overview() -> Iterator[str]:
    """A line for each backbone of `configs/backbone/`."""
    for name in config.names("backbone"):
        cfg = OmegaConf.create(config.load_group("backbone", name))
        file = here(cfg, {"hf_hub_id": origins.hub_repository(cfg.timm)})
        missing = {None: "name a file", "none": "needs none"}.get(cfg.weights, "not here")
        state = missing if file is None else "here"
        licence = licence_of(cfg) or "see its card"
        yield f"{name:<22} {state:<12} {licence:<16} {taught(cfg)}"


def report(cfg: DictConfig, fetch: bool = False) -> Iterator[str]:
    """All of it, line by line. `fetch`: download what is missing first. Raises WeightsError, see `examine`."""
    yield f"{cfg.name}: {taught(cfg)}"
    found = origin(cfg)
    yield from describe(found, ask_hub(found) if found.file is None else {})
    if fetch and cfg.weights == "hub" and found.file is None:
        origins.expect_acknowledged((cfg.licence, found.record.get("license")), cfg.timm, cfg.acknowledge_licence)
        origins.fetch(cfg.timm, found.record)
        found = origin(cfg)
    yield from examine(cfg, found)


def expect_named(cfg: DictConfig) -> None:
    """Raises WeightsError where a file has to be named or is not there, ConfigError for terms that nobody accepted."""
    origins.locate(cfg.weights, cfg.name, cfg.get("published_file"))
    if cfg.weights != "none":
        origins.expect_acknowledged((cfg.licence,), cfg.timm, cfg.acknowledge_licence)


def expect_here(cfg: DictConfig) -> None:
    """Before any picture is read: the file is there, or is fetched from the hub now.

    Raises ConfigError for terms that nobody accepted, WeightsError for a file that is missing and cannot be fetched.
    """
    expect_named(cfg)
    if cfg.weights == "hub":
        from models.backbone import outline

        record, *_ = outline(cfg)
        origins.expect_acknowledged((cfg.licence, record.get("license")), cfg.timm, cfg.acknowledge_licence)
        origins.fetch(cfg.timm, record)


def describe(found: Origin, asked: dict[str, Any]) -> Iterator[str]:
    """What the weights are, where they come from and belong, under which terms. `asked`: what the hub said."""
    whole = "" if found.numbers == found.published else " without its classifier"
    yield f"network  {found.network} of timm, {found.numbers / 1e6:.1f} million numbers{whole}"
    yield f"licence  {found.licence}" + (
        "; it restricts use: read its terms, then set backbone.acknowledge_licence=true"
        if origins.RESTRICTED.search(found.licence)
        else ""
    )
    if found.hub_id:
        yield f"address  https://huggingface.co/{found.hub_id}"
    if found.url:
        yield f"address  {found.url}" + (" (the authors' file)" if found.hub_id else "")
    if found.published_file:
        yield f"file     {found.published_file}"
    if asked:
        yield f"size     {mebibytes(asked['size'])}, sha256 {asked['sha256']}, as the hub says"
    elif found.file is None and found.place and found.hub_id:
        yield f"size     about {mebibytes(4 * found.published)} (the hub was not reached, so its sum is unknown here)"
    yield f"goes to  {found.place}"


def examine(cfg: DictConfig, found: Origin) -> Iterator[str]:
    """A line: the file that is here, its sum, and that it fits the network. Raises WeightsError where it is missing,
    has another sum, or does not fit."""
    if cfg.weights == "none":
        yield "ok       random weights need no file"
        return
    if found.file is None:
        if cfg.weights == "hub":
            raise WeightsError(
                f"backbone.weights=hub: {found.network} is not here yet; `run.py weights backbone={cfg.name} "
                "fetch=true` fetches it where there is a network, and so does the first training"
            )
        origins.locate(cfg.weights, cfg.name, found.published_file)  # raises: a file must be named
    own = sha256(found.file)
    if found.sha256 is not None and not own.startswith(found.sha256):
        raise WeightsError(
            f"{found.file}: sha256 {own} is not that of the published file, {found.sha256}; it is damaged or another "
            "one: delete it and fetch it again"
        )
    from models.backbone import Backbone

    Backbone(cfg)
    held = ", as published" if found.sha256 is not None else ""
    yield f"ok       {found.file}: {mebibytes(found.file.stat().st_size)}, sha256 {own}{held}; fits the network"


def hub_cache() -> Path:
    """The folder of the hub's downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def named_sum(file: Path | None) -> str | None:
    """The sha256, or its beginning, that a download carries in its name: the hub's blobs are named by it, files of
    torch's and timm's addresses end in eight digits of it."""
    if file is None:
        return None
    blob = file.resolve().name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else origins.stated_sum(file.name)


def ask_hub(found: Origin) -> dict[str, Any]:
    """Size (bytes) and sha256 of a file as the hub states them; empty where it cannot be reached or does not say."""
    if not found.hub_id:
        return {}
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo, _, revision = found.hub_id.partition("@")
    for name in found.hub_names:
        try:
            stated = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision or None), timeout=5)
        except Exception:  # a file of another name, or no network: classes of four libraries
            continue
        if stated.size and re.fullmatch("[0-9a-f]{64}", stated.etag or ""):
            return {"size": stated.size, "sha256": stated.etag}
    return {}


def sha256(path: Path) -> str:
    """The sum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def mebibytes(size: int) -> str:
    """`82.7 MiB`."""
    return f"{size / 2**20:.1f} MiB"
