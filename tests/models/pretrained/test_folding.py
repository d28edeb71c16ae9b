"""Folded batch norms: the same function to rounding, and nothing folded where it would not be."""

import timm
import torch
from torch import nn

from models.pretrained.folding import fold_batch_norms


def randomised(net: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.copy_(0.3 * torch.randn(values.shape, generator=generator))
            for values in (module.running_var, module.weight.data):
                values.copy_(0.5 + torch.rand(values.shape, generator=generator))
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def test_real_networks_give_the_same_maps():
    for name in ("test_resnet", "test_efficientnet", "resnet10t"):
        net = randomised(timm.create_model(name, features_only=True))
        folded = fold_batch_norms(net)
        assert norms(net) > 0
        assert norms(folded) <= 1, name  # one may follow a stem of several layers
        picture = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            for one, two in zip(net(picture), folded(picture), strict=True):
                assert torch.allclose(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max())), name


def test_a_network_that_calls_its_parts_in_another_order_is_left_alone():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(torch.relu(self.norm(x)))

    net = randomised(Crossed())
    assert fold_batch_norms(net) is net
    assert norms(net) == 1


def test_a_network_without_batch_norm_is_returned_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    assert fold_batch_norms(net) is net
