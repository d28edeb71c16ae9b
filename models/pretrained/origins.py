"""Where weights of backbones come from: bundled, a file, the hub or an address, and under which terms.

Imports torch only to ask an address.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.errors import ConfigError, WeightsError
from common.files import no_file

log = logging.getLogger(__name__)

BUNDLED = Path(__file__).resolve().parent / "bundled"
WORDS = ("bundled", "hub", "none")

RESTRICTED = re.compile(r"(^|[^a-z])(nc|non-?commercial|research|dinov3|sapiens2|amlr|seer)([^a-z]|$)", re.IGNORECASE)


def expect_acknowledged(licences: Iterable[str | None], timm_name: str, acknowledged: bool) -> None:
    """Refuse weights under non-commercial or own terms (MAE, MoCo, SwAV, MSN, EUPE, DINOv3) that nobody has accepted.

    Raises:
        ConfigError: naming the licence and the key to set.
    """
    for licence in licences:
        if licence and RESTRICTED.search(licence) and not acknowledged:
            raise ConfigError(
                f"backbone.acknowledge_licence=false: the weights of {timm_name} come under {licence}, which restricts "
                "their use; read its terms, then set backbone.acknowledge_licence=true"
            )


def locate(weights: str | None, name: str, published_file: str | None) -> str | Path:
    """What `backbone.weights` points at: the word `hub` or `none`, or the path of an existing file.

    Raises:
        WeightsError: no value where a preset needs a file, nothing bundled under that name, or no such file.
    """
    if weights is None:
        raise WeightsError(
            f"backbone.weights=null: the weights of {name} come from a file; get {published_file or 'its weight file'} "
            "and set backbone.weights=<file>"
        )
    if weights == "bundled":
        path = BUNDLED / f"{name}.safetensors"
        if not path.is_file():
            bundled = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.safetensors"))) or "none so far"
            raise WeightsError(
                f"backbone.weights=bundled: no weights of {name} come with this version (bundled: {bundled}); "
                "set backbone.weights to hub, to a file, or to none (random and seeded)"
            )
        return path
    if weights in WORDS:
        return weights
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"backbone.weights={weights}: {no_file(path)}; give a .pth, .pt or .safetensors file, or {', '.join(WORDS)}"
        )
    return path


def fetch(tag: str, pretrained_cfg: Mapping[str, Any]) -> Path:
    """The file of a timm tag's published weights: where an earlier download left it, else from the network.

    The hub's cache is locked by file, so the processes of one node do not download twice.

    Args:
        tag: timm name with its tag, for messages.
        pretrained_cfg: timm's record of the tag (`hf_hub_id`, `hf_hub_filename`, `url`).

    Raises:
        WeightsError: no published weights under this name, or they could not be had.
    """
    hub_id, url = pretrained_cfg.get("hf_hub_id"), pretrained_cfg.get("url")
    if not hub_id and not url:
        raise WeightsError(
            f"backbone.weights=hub: timm publishes no weights for {tag}; add a tag to backbone.timm, set "
            "backbone.weights=<file>, or backbone.weights=none for random ones"
        )
    here = cached(pretrained_cfg)
    if here is not None:  # needs no network at all: published weights do not change
        return here
    try:
        return _from_hub(hub_id, hub_names(pretrained_cfg)) if hub_id else _from_address(url)
    except Exception as error:  # the network stack below raises classes of four libraries
        reason = type(error).__name__
        raise WeightsError(
            f"backbone.weights=hub: {tag} ({hub_id or url}) could not be downloaded ({reason}); no random weights were "
            "put in its place; set backbone.weights=<file>, or download it once where there is a network and use the "
            "same HF_HOME here (HF_HUB_OFFLINE=1 saves the waiting)"
        ) from error


def cached(pretrained_cfg: Mapping[str, Any]) -> Path | None:
    """The file that an earlier download of a tag left on this machine; None where there is none."""
    hub_id, url = pretrained_cfg.get("hf_hub_id"), pretrained_cfg.get("url")
    if hub_id:
        from huggingface_hub import try_to_load_from_cache

        repo, _, revision = hub_id.partition("@")
        for name in hub_names(pretrained_cfg):
            found = try_to_load_from_cache(repo, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        return None
    path = _address_file(url) if url else None
    return path if path is not None and path.is_file() else None


def hub_repository(tag: str) -> str:
    """Where timm keeps the weights of its tags on the Hugging Face hub; few of its tags are elsewhere (`hf_hub_id`)."""
    return f"timm/{tag}"


def hub_names(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Files of a repository on the hub that may hold the weights, in the order in which they are looked for."""
    name = pretrained_cfg.get("hf_hub_filename")
    return (name,) if name else ("model.safetensors", "pytorch_model.bin")


def _from_hub(hub_id: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = hub_id.partition("@")
    log.info("fetching %s from huggingface.co, once; HF_HUB_OFFLINE=1 never asks for it", repo)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it says each of its attempts twice
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(repo, name, revision=revision or None))
        except LocalEntryNotFoundError:  # no network: the next name would only wait once more
            raise
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repo, names[-1], revision=revision or None))


def address_folder() -> Path:
    """Where torch keeps what it downloads from addresses."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _address_file(url: str) -> Path:
    return address_folder() / url.rsplit("/", 1)[-1]


def _from_address(url: str) -> Path:
    import torch

    path = _address_file(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(url, str(path), stated_sum(path.name), progress=False)  # torch compares it
    return path


def stated_sum(name: str) -> str | None:
    """The beginning of the sha256 that a file's name ends in, as torch and timm name what they publish; or None."""
    found = re.search(r"-([0-9a-f]{8,})\.", name)
    return found.group(1) if found else None


def plain(value: Any) -> Any:
    """A part of a configuration as lists and dicts."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@cache
def log_once(level: int, message: str) -> None:
    """A line of the log that a process says once."""
    log.log(level, message)
