"""Backbones: any timm network, frozen or trained, as one function from pictures to patch features.

A vision transformer gives the maps of any of its blocks, the class token, and the queries, keys, values and attention
logits of any block; a convolutional network gives the maps of its levels. This is the only file that imports timm.
"""

import importlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig
from timm.layers import Attention, AttentionRope, Conv2dSame, convert_sync_batchnorm
from timm.models import VisionTransformer
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import chance
from common.errors import ConfigError, did_you_mean, one_of
from common.precision import real
from models.debias.places import Debias, debias_of
from models.features import Features
from models.output_stride import OutputStrides
from models.pretrained import origins, weights
from models.pretrained.folding import fold_batch_norms
from models.scratch.makers import MAKERS
from models.vit import attention as layers
from models.vit import positions

for maker in MAKERS:
    timm.models.register_model(maker)

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_KEYS = ("num_classes", "features_only", "out_indices", "output_stride", "pad_type", "dynamic_img_size")
"""timm arguments that this file sets by itself, so `backbone.create` may not."""

BEHIND = ("fc_norm", "attn_pool", "head", "head_dist", "mask_token")
"""Parts of a transformer that no patch feature depends on."""


class DinoPositions(VisionTransformer):
    """A VisionTransformer that interpolates its position embedding by the rule of the DINO release.

    The class of a finished network is exchanged for this one, which keeps copies and pickles of it right."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:3])
        rows = 0 if self.no_embed_class else self.num_prefix_tokens
        embedding = positions.resample(self.pos_embed, self.patch_embed.grid_size, grid, rows, "dino")
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        patches = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*tokens, patches + embedding], dim=1))
        return self.pos_drop(torch.cat([*tokens, patches], dim=1) + embedding)


class Backbone(nn.Module):
    """A timm network under the keys of `configs/backbone/*.yaml`.

    Attributes:
        in_channels: of the pictures (`backbone.create.in_chans`, 3 where it is not set).
        channels: C of each level; `dim` is their sum (the width of `Features.concat()`).
        file_names: name of each weight here -> its name in weight files (timm's whole network).
        strides: pixels per patch of each level (in training, where it differs); `stride` is that of `Features.map`.
        patch_multiple: H and W of pictures must be multiples of it (1 for convolutional networks).
        prefix: tokens in front of the patches (0 for convolutional networks).
        class_token: whether the network has one that was trained (`backbone.class_token`).
        heads: attention heads of a block (0 without attention).
        has_attention: whether `features(attention=True)` and `qkv=True` can be had.
        frozen: no gradients, evaluation mode whatever `train()` says.
        licence: of the loaded weights; "none (random weights)" for `weights: none`.
        fingerprint: network, its arguments and sha256 of the loaded weights.
        debias: what takes places out of the maps (`backbone.debias`); None without.

    Raises:
        ConfigError: unknown timm name (with near ones), a level that does not exist, settings that the network does not
            have, or a restricted licence that was not acknowledged.
        WeightsError: weights that are missing or belong to another network. Never replaced by random ones.
    """

    def __init__(self, cfg: DictConfig, seed: int = 0):
        super().__init__()
        self.name: str = cfg.name
        self.network: str = cfg.timm
        self.frozen: bool = cfg.frozen
        self.precision: str = cfg.precision
        create = origins.plain(cfg.create) or {}
        self._check_settings(cfg, create)
        with chance.library_draws(seed, "backbone/init"):
            with torch.device("meta"):  # the shape of the full network: which family it is, which keys its files have
                whole = _create(self.network, **create)
            self.transformer = all(hasattr(whole, part) for part in ("blocks", "patch_embed", "num_prefix_tokens"))
            published = dict(whole.pretrained_cfg)
            source = self._locate(cfg, published)
            options = self._options(cfg, whole)
            self.order = self._levels(origins.plain(cfg.levels), whole)
            if not self.transformer:
                options |= {"features_only": True, "out_indices": tuple(sorted(self.order))}
            self.net = _create(self.network, **create, **options)
        own = {weights.flat(key): key for key in self.net.state_dict()}
        self.file_names = {own[weights.flat(key)]: key for key in whole.state_dict() if weights.flat(key) in own}
        if self.transformer:
            self._describe_transformer(cfg)
        else:
            self._describe_maps()
        mean, std = origins.plain(cfg.mean) or published["mean"], origins.plain(cfg.std) or published["std"]
        self.in_channels: int = create.get("in_chans") or 3
        if {len(mean), len(std)} != {self.in_channels} or min(std) <= 0:
            given = f"backbone.mean={list(mean)}, backbone.std={list(std)}"
            raise ConfigError(f"{given}: expected {self.in_channels} numbers each, one a channel, std above 0")
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)
        self.output_strides = self._output_strides(cfg, create, options)
        self.norms_frozen = bool(cfg.get("freeze_norms"))
        self._load(cfg, source, seed, whole, published)
        arguments = {**create, **{key: options[key] for key in ("pad_type", "output_stride") if key in options}}
        settings = [list(self.order), cfg.level_norm, cfg.pos_interp, list(mean), list(std), self.precision]
        values = weights.identity(self.net.state_dict())
        self.fingerprint = f"{self.network} {json.dumps(arguments, sort_keys=True)} {values}"
        self.settings_key = json.dumps(settings)
        self.debias: Debias | None = debias_of(cfg, self.channels)
        self.fingerprint += f" {self.debias.name}" if self.debias is not None else ""
        self._set_gradients()
        self.train()
        if self.frozen and not self.transformer:
            self.net = fold_batch_norms(self.net, self.in_channels).eval()

    # ---- what is asked of the configuration -----------------------------------------------------------------------

    def _check_settings(self, cfg: DictConfig, create: dict[str, Any]) -> None:
        _expect_known(self.network)
        one_of("backbone.precision", self.precision, PRECISIONS)
        if not self.frozen and self.precision != "float32":
            raise ConfigError(
                f"backbone.precision={self.precision}: is for frozen backbones; with backbone.frozen=false set "
                "trainer.precision instead and leave backbone.precision=float32"
            )
        one_of("backbone.pos_interp", cfg.pos_interp, positions.RULES)
        for key in OWN_KEYS:
            if key in create:
                raise ConfigError(f"backbone.create.{key}: cannot be set here; it follows from the other backbone keys")

    def _options(self, cfg: DictConfig, whole: nn.Module) -> dict[str, Any]:
        given = {key: cfg[key] for key in ("pad_type", "output_stride") if cfg[key] is not None}
        if not self.transformer:
            return given
        for key, value in given.items():
            raise ConfigError(f"backbone.{key}={value}: {self.network} is a transformer and has none; set it to null")
        return {"num_classes": 0} | ({"dynamic_img_size": True} if hasattr(whole, "dynamic_img_size") else {})

    def _output_strides(self, cfg: DictConfig, create: dict[str, Any], options: dict[str, Any]) -> OutputStrides | None:
        """How the network changes between training and evaluation; None where it does not."""
        wanted = cfg.get("eval_output_stride")
        if wanted is None or wanted == cfg.output_stride:
            return None
        if self.frozen:
            raise ConfigError(
                f"backbone.eval_output_stride={wanted}: a frozen backbone has one stride; set it to null and "
                f"backbone.output_stride={wanted}"
            )
        with torch.device("meta"):
            other = _create(self.network, **create, **{**options, "output_stride": wanted})
        return OutputStrides(self.net, other, f"backbone.eval_output_stride={wanted}")

    def _levels(self, wanted: int | list[int] | None, whole: nn.Module) -> list[int]:
        """`backbone.levels` as non-negative indices in the order given."""
        count = len(whole.blocks) if self.transformer else len(getattr(whole, "feature_info", None) or ())
        if not count:
            raise ConfigError(f"backbone.timm={self.network}: timm gives no feature maps of it; choose another network")
        wanted = [-1] if wanted is None else [wanted] if isinstance(wanted, int) else wanted
        order = [level + count if level < 0 else level for level in wanted]
        if not order or not all(0 <= level < count for level in order) or len(set(order)) < len(order):
            raise ConfigError(
                f"backbone.levels={wanted}: expected different numbers from {-count} to {count - 1} "
                f"({self.network} has {count} {'blocks' if self.transformer else 'levels'}), or null for the last"
            )
        return order

    # ---- what the network is --------------------------------------------------------------------------------------

    def _describe_transformer(self, cfg: DictConfig) -> None:
        net = self.net
        self.stride = self.patch_multiple = int(net.feature_info[-1]["reduction"])
        self.channels, self.strides = [net.embed_dim] * len(self.order), [self.stride] * len(self.order)
        self.prefix = net.num_prefix_tokens
        self.class_token = self.prefix > 0 and bool(cfg.get("class_token", True))
        attentions = [getattr(block, "attn", None) for block in net.blocks]
        self.has_attention = all(isinstance(a, Attention | AttentionRope | EvaAttention) for a in attentions)
        self.heads = attentions[0].num_heads if self.has_attention else 0
        self.level_norm = cfg.level_norm
        if self.level_norm and isinstance(net.norm, nn.Identity):
            raise ConfigError(f"backbone.level_norm=true: {self.network} has no final norm; set it to false")
        if cfg.pos_interp == "dino":
            if type(net) is not VisionTransformer or net.pos_embed is None:
                raise ConfigError(
                    f"backbone.pos_interp=dino: {self.network} has no position embedding of DINO's kind; "
                    "set backbone.pos_interp=timm"
                )
            net.__class__ = DinoPositions

    def _describe_maps(self) -> None:
        info = {
            level: (channels, stride)
            for level, channels, stride in zip(
                sorted(self.order), self.net.feature_info.channels(), self.net.feature_info.reduction(), strict=True
            )
        }
        self.channels, self.strides = [info[i][0] for i in self.order], [int(info[i][1]) for i in self.order]
        self.stride, self.patch_multiple, self.prefix, self.heads = self.strides[-1], 1, 0, 0
        self.has_attention = self.class_token = False
        if stages := getattr(self.net, "_stage_out_idx", None):  # only this family is not cut behind its last level
            self.net.blocks = self.net.blocks[: max(stages)]
        self.turned = str(getattr(self.net, "output_fmt", "")).endswith("NHWC")
        self.net.to(memory_format=torch.channels_last)  # convolutions run up to a fifth faster, equal to rounding

    @property
    def dim(self) -> int:
        return sum(self.channels)

    @property
    def features_key(self) -> str:
        """The fingerprint and all else that the features hang on; keys caches of features."""
        return f"{self.fingerprint} {self.settings_key}" + (self.debias.values if self.debias is not None else "")

    # ---- weights --------------------------------------------------------------------------------------------------

    def _locate(self, cfg: DictConfig, published: dict[str, Any]) -> str | Path:
        """Where the weights come from, and their licence; refuses what cannot or must not be loaded before any work."""
        card = published.get("license") if cfg.weights == "hub" else None
        own = {"none": "none (random weights)", "bundled": "that of this project"}
        self.licence: str = own.get(cfg.weights) or cfg.licence or card or "unknown"
        if cfg.weights != "none":
            origins.expect_acknowledged((cfg.licence, card), self.network, cfg.acknowledge_licence)
        return origins.locate(cfg.weights, self.name, cfg.get("published_file"))

    def _load(
        self, cfg: DictConfig, source: str | Path, seed: int, whole: nn.Module, published: dict[str, Any]
    ) -> None:
        """Put the weights into the network; all of them, or none where `backbone.weights=none` asks for random ones."""
        if source == "none":
            origins.log_once(logging.WARNING, f"backbone {self.name}: random weights ({self.network}, seed {seed})")
            return
        content = weights.download(self.network, published) if source == "hub" else weights.read(source)
        shapes = {key: tensor.shape for key, tensor in self.net.state_dict().items()}
        named = {published: own for own, published in self.file_names.items() if own in shapes}
        entry = importlib.import_module(timm.models.model_entrypoint(self.network.partition(".")[0]).__module__)
        translate: Callable | None = getattr(entry, "checkpoint_filter_fn", None)
        target = self.net if self.transformer else whole
        absolute = self.transformer and getattr(self.net, "pos_embed", None) is not None
        fitted = weights.fit(
            content,
            {key: shapes[name] for key, name in named.items()},
            source=f"backbone.weights={cfg.weights}",
            network=self.network,
            unused=frozenset(whole.state_dict()) - named.keys(),
            convert=(lambda state: translate(state, target)) if translate else None,
            grid=tuple(self.net.patch_embed.grid_size) if absolute else None,
            prefix_rows=0 if getattr(self.net, "no_embed_class", False) else self.prefix,
            rule=cfg.pos_interp,
        )
        self.net.load_state_dict({named[key]: tensor for key, tensor in fitted.state.items()}, strict=True)
        below = f" under {fitted.prefix}" if fitted.prefix else ""
        bundled = f"see models/pretrained/bundled/{self.name}.md" if cfg.weights == "bundled" else None
        origins.log_once(
            logging.INFO,
            f"backbone {self.name}: {self.network}, weights {cfg.weights}{below}; "
            f"pre-training: {cfg.get('pretraining') or bundled or 'not stated'}; licence: {self.licence}",
        )

    def _set_gradients(self) -> None:
        """Gradients for what the chosen levels depend on, none where frozen (DDP wants no parameter left over)."""
        self.net.requires_grad_(not self.frozen)
        if self.frozen or not self.transformer:
            return
        behind = [self.net.blocks[max(self.order) + 1 :], *(getattr(self.net, part, None) for part in BEHIND)]
        for part in behind if self.level_norm else [*behind, self.net.norm]:
            if isinstance(part, nn.Module | nn.Parameter):
                part.requires_grad_(False)

    @property
    def unmodified_weights(self) -> bool:
        """True while the config alone gives these weights again (from their file, or from the seed)."""
        return self.frozen

    def state_to_save(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of this backbone: what the config does not give again."""
        return {k: v for k, v in self.state_dict().items() if not self.unmodified_weights or k.startswith("debias.")}

    def exported(self) -> dict[str, Tensor]:
        """The weights under the names that timm's whole network has: what `backbone.weights=<file>` reads back."""
        return {self.file_names[key]: value.detach() for key, value in self.net.state_dict().items()}

    def train(self, mode: bool = True) -> "Backbone":
        """As usual, but a frozen backbone stays in evaluation mode (its batch norms keep their statistics), and so do
        batch norms that are frozen (`backbone.freeze_norms`). The output stride is that of the mode."""
        super().train(mode and not self.frozen)
        if self.norms_frozen:
            for module in self.net.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        if self.output_strides is not None:
            self.output_strides.set(self.net, self.training)
        return self

    @contextmanager
    def training_stride(self) -> Iterator[None]:
        """Inside, the network has the output stride of training, whatever mode it is in."""
        if self.output_strides is None or self.training:
            yield
            return
        self.output_strides.set(self.net, training=True)
        try:
            yield
        finally:
            self.output_strides.set(self.net, training=False)

    # ---- picture sizes --------------------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """Side of the coarsest cell, px: pictures whose sides are multiples of it have whole cells alone."""
        return max(self.patch_multiple, *self.strides)

    def fit_size(self, height: int, width: int) -> tuple[int, int]:
        """The next size upwards that the backbone takes, in pixels."""
        step = self.patch_multiple
        return -(-height // step) * step, -(-width // step) * step

    def check_size(self, size: int | Sequence[int] | None, key: str = "data.train_size or data.eval_size") -> None:
        """Hold a picture size (px, a number or [H,W]; None: not fixed) against the patch size.

        Raises:
            ConfigError: not a multiple of the patch; names `key` and the nearest valid sizes.
        """
        if size is None:
            return
        height, width = (size, size) if isinstance(size, int) else size
        if (height, width) == self.fit_size(height, width) and min(height, width) > 0:
            return
        above, step = self.fit_size(max(height, 1), max(width, 1)), self.patch_multiple
        below = tuple(max(side // step * step, step) for side in (height, width))
        raise ConfigError(
            f"{key}: pictures of {height} x {width} px do not fit {self.network}, whose patches are {step} px: height "
            f"and width must be multiples of {step}; set {key} to {below[0]} x {below[1]} or {above[0]} x {above[1]}"
        )

    # ---- features -------------------------------------------------------------------------------------------------

    def features(
        self,
        images: Tensor,
        grad: bool = False,
        attention: bool = False,
        qkv: bool = False,
        block: int = -1,
        hidden: tuple[Tensor, Tensor] | None = None,
        keys: Sequence[int] = (),
    ) -> Features:
        """Features of pictures [B,3,H,W] in 0..1, `in_channels` in place of 3 where they differ (normalised here).

        Maps have H / stride rows, for convolutional networks rounded up; `net10a` may have some fewer. Without `grad`,
        and always for a frozen backbone, there is no graph; the results are ordinary tensors even under
        `torch.inference_mode`, so that they may be kept and trained on later.

        Args:
            images: float, H and W multiples of `patch_multiple`.
            grad: record gradients; has no effect on a frozen backbone.
            attention: also the attention logits of `block`. All blocks keep their fused attention.
            qkv: also queries, keys and values of `block`.
            block: index of the block, negative from the end.
            hidden: (mask bool [B,h,w], token [C]): the token takes the place of masked patches, before their position
                is added. Transformers only.
            keys: also the attention keys of the patches in these blocks, negative from the end.

        Raises:
            ConfigError: a size that does not fit, or attention asked of a network that has none.
        """
        if (attention or qkv or keys) and not self.has_attention:
            raise ConfigError(
                f"backbone={self.name}: {self.network} has no attention to give; let the method use an affinity of the "
                "features instead (method.lhp.attention=affinity), or choose a vision transformer"
            )
        if keys and self.debias is not None:
            self.debias.refuse_keys()
        self.check_size(images.shape[-2:])
        with ExitStack() as stack:
            if self.frozen or not grad:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            if self.frozen:
                dtype = PRECISIONS[self.precision]
                stack.enter_context(torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None))
            elif grad and images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
                stack.enter_context(layers.unfused(self.net))
            pictures = (real(images) - self.mean) / self.std
            try:
                if hidden is not None and self.transformer:
                    stack.enter_context(layers.hiding(self.net.patch_embed, *hidden))
                found = self._seen(pictures, attention, qkv, block, keys)
                if self.debias is not None:
                    black = (-self.mean / self.std).expand(1, -1, *pictures.shape[-2:])
                    found.levels = self.debias(found.levels, lambda: self._seen(black).levels)
                return found
            except AssertionError as error:  # some transformers take one size only
                size = " x ".join(map(str, images.shape[-2:]))
                raise ConfigError(f"{self.network} refuses pictures of {size} px: {error}") from None

    forward = features

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        outputs = self.net(pictures.contiguous(memory_format=torch.channels_last))
        maps = dict(zip(sorted(self.order), outputs, strict=True))
        maps = [maps[level].permute(0, 3, 1, 2) if self.turned else maps[level] for level in self.order]
        return [real(level).contiguous() for level in maps]

    def _seen(
        self, pictures: Tensor, attention: bool = False, qkv: bool = False, block: int = -1, keys: Sequence[int] = ()
    ) -> Features:
        if not self.transformer:
            return Features(self._maps(pictures))
        depth = len(self.net.blocks)
        for number in (block, *keys):
            if not -depth <= number < depth:
                raise ConfigError(f"block {number}: {self.network} has blocks {-depth} to {depth - 1}")
        block, keys = block % depth, [number % depth for number in keys]
        watched = {*keys, *([block] if attention or qkv else [])}
        indices = sorted({*self.order, *watched})
        with ExitStack() as stack:
            attns = {number: self.net.blocks[number].attn for number in watched}
            seen = {number: stack.enter_context(layers.watching(attn)) for number, attn in attns.items()}
            outputs = self.net.forward_intermediates(
                pictures, indices=indices, norm=self.level_norm, stop_early=True, return_prefix_tokens=self.prefix > 0,
                output_fmt="NCHW", intermediates_only=True,
            )  # fmt: skip
        pairs = outputs if self.prefix else [(level, None) for level in outputs]
        found = dict(zip(indices, pairs, strict=True))
        result = Features([real(found[level][0]) for level in self.order], prefix=self.prefix)
        if getattr(self.net, "cls_token", None) is not None:
            result.cls = real(found[self.order[-1]][1][:, 0])
        if not watched:
            return result
        with torch.autocast(pictures.device.type, enabled=False):
            projected = {number: layers.project(attns[number], seen[number]) for number in watched}
            if keys:
                result.keys = [layers.key_map(projected[number], self.prefix, result.map.shape[-2:]) for number in keys]
            result.qkv = projected[block] if qkv else None
            if attention:
                result.attention = layers.logits(attns[block], projected[block], seen[block].get("rope"))
        return result


def synchronise_norms(module: nn.Module) -> bool:
    """Let every batch norm below `module` see the batch of all processes (GPUs only), in place; whether there is any.

    timm's own conversion: that of torch loses the activation that some of timm's batch norms carry.
    """
    found = any(isinstance(part, _BatchNorm) for part in module.modules())
    if found:
        convert_sync_batchnorm(module)
    return found


def pads_by_size(module: nn.Module) -> bool:
    """Whether a convolution pads by the size of what it gets, as TensorFlow's "same" does."""
    return isinstance(module, Conv2dSame)


def outline(cfg: DictConfig) -> tuple[dict[str, Any], int, int]:
    """timm's record of the published weights, the numbers in the network as it is published, and those without its
    classifier, which no backbone uses; no memory is taken for it."""
    _expect_known(cfg.timm)
    with torch.device("meta"):
        whole = _create(cfg.timm, **(origins.plain(cfg.create) or {}))
        published = _numbers(whole)
        whole.reset_classifier(0)
    return dict(whole.pretrained_cfg), published, _numbers(whole)


def _numbers(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def _expect_known(name: str) -> None:
    if name not in (known := [*timm.list_models(), *timm.list_models(pretrained=True)]):
        raise ConfigError(f"backbone.timm={name}: timm has no such network; {did_you_mean(name, known)}")


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        settings = ", ".join(f"{key}={value}" for key, value in kwargs.items()) or "its defaults"
        raise ConfigError(f"backbone.timm={name}: timm cannot build it with {settings}: {reason}") from None
