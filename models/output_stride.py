"""One convolutional network at two output strides: strides, dilations and paddings change places, weights stay.

SegSort's and HSG's releases train at output stride 16 and test at 8 with the same weights. timm builds a network for
one stride; the modules in which two such networks differ are found by comparison, so no network has to be known here.
"""

from typing import Any

from torch import nn

from common.errors import ConfigError

SETTINGS = ("stride", "dilation", "padding")


class OutputStrides:
    """What the modules of `net` have to be set to for each of two output strides.

    net: the network as it is trained. other: the same network built for evaluation (its weights are not looked at).

    Raises:
        ConfigError: the two differ in more than strides, dilations and paddings. `what` begins the message.
    """

    def __init__(self, net: nn.Module, other: nn.Module, what: str) -> None:
        own, theirs = dict(net.named_modules()), dict(other.named_modules())
        alike = [type(module) for module in own.values()] == [type(module) for module in theirs.values()]
        if own.keys() != theirs.keys() or not alike:
            raise ConfigError(f"{what}: the network is built of other parts at that stride; set it to null")
        self.changes: list[tuple[str, str, Any, Any]] = [
            (name, setting, getattr(own[name], setting), getattr(theirs[name], setting))
            for name in own
            for setting in SETTINGS
            if getattr(own[name], setting, None) != getattr(theirs[name], setting, None)
        ]

    def set(self, net: nn.Module, training: bool) -> None:
        """Put the settings for training or for evaluation into the modules of `net`, in place."""
        modules = dict(net.named_modules())
        for name, setting, for_training, for_evaluation in self.changes:
            setattr(modules[name], setting, for_training if training else for_evaluation)
