"""Backbones: features, attention against the unfused path, sizes, freezing, gradients, precision."""

import copy
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import ConfigError
from models.backbone import Backbone, Features, synchronise_norms
from models.vit import positions
from tests.models.networks import CREATE_OF, REGISTERS, TRANSFORMERS, make_cfg, make_cnn, make_transformer

# ---- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [-1, 0])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_equals_the_unfused_path(name, block):
    model = make_transformer(name)
    images = torch.rand(2, 3, 48, 32)
    before = model.features(images)
    found = model.features(images, attention=True, qkv=True, block=block)

    attn = model.net.blocks[block].attn
    fused, seen = attn.fused_attn, []
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_hook(lambda _, args, output: seen.append(output))
    model.features(images)
    handle.remove()
    attn.fused_attn = fused

    tokens = model.prefix + 6 * 4
    assert found.attention.shape == (2, model.heads, tokens, tokens)
    assert found.qkv.shape == (3, 2, model.heads, tokens, 16)
    assert (found.attention.softmax(dim=-1) - seen[0]).abs().max() < 1e-5
    assert seen[0].std(dim=-1).max() > 1e-3  # not the uniform matrix
    assert torch.equal(found.map, before.map)
    assert before.attention is None
    assert before.qkv is None
    assert all(b.attn.fused_attn == fused for b in model.net.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())


def test_keys_are_the_projection():
    model = make_transformer("vit_tiny_patch16_224")
    seen = []
    attn = model.net.blocks[1].attn
    attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    keys = model.features(torch.rand(1, 3, 32, 32), qkv=True, block=1).qkv[1]
    weight, bias = attn.qkv.weight[32:64], attn.qkv.bias[32:64]
    expected = (seen[0] @ weight.T + bias).reshape(1, 17, 2, 16).transpose(1, 2)
    assert torch.allclose(keys, expected, atol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_keys_of_several_blocks_are_maps_and_change_nothing_else(name):
    model = make_transformer(name)
    images = torch.rand(2, 3, 48, 32)
    found = model.features(images, keys=[-1, -2])
    assert torch.equal(found.map, model.features(images).map)
    assert found.qkv is None
    for block, keys in zip((-1, -2), found.keys, strict=True):
        alone = model.features(images, qkv=True, block=block).qkv[1]
        assert keys.shape == (2, model.heads * 16, 6, 4)
        assert torch.equal(keys[:, 16:32, 2, 3], alone[:, 1, model.prefix + 2 * 4 + 3])
    depth = len(model.net.blocks)
    with pytest.raises(ConfigError, match=rf"^block {depth}: .* has blocks -{depth} to {depth - 1}$"):
        model.features(images, keys=[depth])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_are_timms(name):
    model = make_transformer(name, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    images = torch.rand(2, 3, 32, 48)
    found = model.features(images)
    pictures = (images - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    with torch.no_grad():
        tokens = model.net.forward_features(pictures)
    if not isinstance(model.net.norm, nn.Identity) or not model.level_norm:
        expected = tokens[:, model.prefix :].transpose(1, 2).reshape(2, 32, 4, 6)
        assert torch.allclose(found.map, expected, atol=1e-5)
    if model.net.cls_token is not None:
        assert torch.allclose(found.cls, tokens[:, 0], atol=1e-5)
    else:
        assert found.cls is None


def test_registers_are_counted():
    model = make_transformer(REGISTERS)
    found = model.features(torch.rand(1, 3, 32, 32), attention=True)
    assert model.prefix == found.prefix == 5
    assert found.map.shape == (1, 32, 4, 4)
    assert found.attention.shape[-1] == 21
    assert model.patch_multiple == model.stride == 8


def test_levels_keep_their_order_and_norm():
    images = torch.rand(1, 3, 32, 32)
    model = make_transformer("vit_tiny_patch16_224", levels=[-1, 0, 1])
    raw = make_transformer("vit_tiny_patch16_224", levels=[-1, 0, 1], level_norm=False)
    found, plain = model.features(images), raw.features(images)
    blocks = []
    for block in raw.net.blocks:
        block.register_forward_hook(lambda _, args, output: blocks.append(output))
    raw.features(images, block=-1, attention=True)
    for level, unnormed, index in zip(found.levels, plain.levels, [2, 0, 1], strict=True):
        expected = blocks[index][:, 1:].transpose(1, 2).reshape(1, 32, 4, 4)
        assert torch.allclose(unnormed, expected, atol=1e-6)
        normed = raw.net.norm(blocks[index])[:, 1:].transpose(1, 2).reshape(1, 32, 4, 4)
        assert torch.allclose(level, normed, atol=1e-5)
    assert found.map is found.levels[-1]
    assert torch.allclose(found.cls, raw.net.norm(blocks[1])[:, 0], atol=1e-5)  # of the block behind map
    assert found.concat().shape == (1, model.dim, 4, 4) == (1, 96, 4, 4)
    assert torch.equal(found.concat()[:, 32:64], found.levels[1])


def test_deeper_block_than_levels_can_be_watched():
    model = make_transformer("vit_tiny_patch16_224", levels=[0])
    found = model.features(torch.rand(1, 3, 32, 32), attention=True, block=2)
    assert len(found.levels) == 1
    whole = make_transformer("vit_tiny_patch16_224")
    image = torch.rand(1, 3, 32, 32)
    expected = whole.features(image, attention=True).attention
    assert torch.allclose(model.features(image, attention=True, block=2).attention, expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"block 3: vit_tiny_patch16_224 has blocks -3 to 2"):
        model.features(image, attention=True, block=3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", REGISTERS])
@pytest.mark.parametrize("rule", positions.RULES)
def test_pos_interp_on_another_grid(name, rule):
    model = make_transformer(name, pos_interp=rule)
    rows = 0 if model.net.no_embed_class else model.prefix
    state = model.net.state_dict()
    state["pos_embed"] = positions.resample(state["pos_embed"], (4, 4), (5, 7), rows, rule)
    fixed = timm.create_model(name, num_classes=0, **(CREATE_OF[name] | {"img_size": (40, 56)})).eval()
    fixed.load_state_dict(state)
    images = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        expected = fixed.forward_features((images - model.mean) / model.std)[:, model.prefix :]
    found = model.features(images).map.flatten(2).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-5)
    other = make_transformer(name, pos_interp="timm" if rule == "dino" else "dino").features(images).map
    assert not torch.allclose(found, other.flatten(2).transpose(1, 2), atol=1e-4)


def test_copies_and_pickles_keep_the_rule():
    model = make_transformer("vit_tiny_patch16_224", pos_interp="dino")
    image = torch.rand(1, 3, 40, 40)
    expected = model.features(image).map
    assert torch.equal(pickle.loads(pickle.dumps(model)).features(image).map, expected)
    clone = copy.deepcopy(model)
    assert torch.equal(clone.features(image).map, expected)
    nn.init.zeros_(clone.net.pos_embed)
    assert not torch.equal(clone.features(image).map, expected)
    assert torch.equal(model.features(image).map, expected)


# ---- convolutional networks and hierarchical transformers ----------------------------------------------------------


def test_cnn_levels_strides_and_concat():
    model = Backbone(make_cnn(levels=[-1, 1, 2], output_stride=16))
    found = model.features(torch.rand(2, 3, 64, 96))
    assert model.channels == [512, 64, 128]
    assert model.strides == [16, 4, 8]
    assert (model.stride, model.dim, model.patch_multiple) == (8, 704, 1)
    assert [tuple(level.shape) for level in found.levels] == [(2, 512, 4, 6), (2, 64, 16, 24), (2, 128, 8, 12)]
    assert found.map is found.levels[-1]
    assert found.concat().shape == (2, 704, 16, 24)
    assert torch.equal(found.concat()[:, 512:576], found.levels[1])
    assert found.cls is None
    assert model.features(torch.rand(1, 3, 65, 50)).map.shape[-2:] == (9, 7)  # any size; rounded up


def test_cnn_values_are_the_networks():
    model = Backbone(make_cnn(levels=[1]))
    images = torch.rand(1, 3, 32, 32)
    net, x = model.net, (images - model.mean) / model.std
    with torch.no_grad():
        expected = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x)))))
    assert torch.allclose(model.features(images).map, expected, atol=1e-6)


def test_layers_behind_the_last_level_are_cut():
    whole = Backbone(make_cnn(timm="mobilenetv2_035", create={}, levels=[1, 4]))
    cut = Backbone(make_cnn(timm="mobilenetv2_035", create={}, levels=[1], frozen=False)).eval()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = cut.features(images, grad=True).map
    assert torch.allclose(found, whole.features(images).levels[0], atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())


def test_channels_last_networks_are_turned():
    create = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "img_size": 64, "window_size": 2}
    model = Backbone(make_cnn(timm="swin_tiny_patch4_window7_224", create=create, levels=[0, -1]))
    assert [tuple(level.shape) for level in model.features(torch.rand(1, 3, 64, 64)).levels] == [
        (1, 16, 16, 16),
        (1, 128, 2, 2),
    ]
    with pytest.raises(ConfigError, match="swin_tiny_patch4_window7_224 refuses pictures of 48 x 48 px"):
        model.features(torch.rand(1, 3, 48, 48))


def test_padding_is_passed_on():
    images = torch.rand(1, 3, 64, 64)
    plain, same = (Backbone(make_cnn(timm="mobilenetv2_035", create={}, pad_type=p)) for p in (None, "same"))
    assert not torch.allclose(plain.features(images).map, same.features(images).map)
    assert plain.fingerprint != same.fingerprint


def test_cnn_has_no_attention():
    model = Backbone(make_cnn())
    assert not model.has_attention
    for asked in ({"attention": True}, {"qkv": True}, {"keys": [-1]}):
        with pytest.raises(ConfigError) as error:
            model.features(torch.rand(1, 3, 32, 32), **asked)
        assert str(error.value) == (
            "backbone=tiny: resnet18 has no attention to give; let the method use an affinity of the "
            "features instead (method.lhp.attention=affinity), or choose a vision transformer"
        )


def test_concat_interpolates_to_the_finest_grid():
    coarse, fine = torch.rand(1, 2, 2, 2), torch.rand(1, 3, 4, 4)
    joined = Features([coarse, fine]).concat()
    expected = nn.functional.interpolate(coarse, size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(joined, torch.cat([expected, fine], dim=1))
    assert Features([coarse]).concat() is coarse


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_size_that_does_not_fit():
    model = make_transformer("vit_tiny_patch16_224")
    with pytest.raises(ConfigError) as error:
        model.features(torch.rand(1, 3, 100, 37))
    assert str(error.value) == (
        "data.train_size or data.eval_size: pictures of 100 x 37 px do not fit vit_tiny_patch16_224, whose patches are "
        "8 px: height and width must be multiples of 8; set data.train_size or data.eval_size to 96 x 32 or 104 x 40"
    )
    with pytest.raises(ConfigError, match=r"^data.eval_size: pictures of 5 x 5 px .* to 8 x 8 or 8 x 8$"):
        model.check_size(5, "data.eval_size")
    for size in (None, 32, [40, 64]):
        model.check_size(size, "data.eval_size")
    assert model.fit_size(100, 37) == (104, 40)
    assert model.fit_size(32, 8) == (32, 8)
    assert Backbone(make_cnn()).fit_size(33, 17) == (33, 17)


# ---- freezing, gradients, precision ---------------------------------------------------------------------------------


def test_frozen_stays_in_evaluation_mode():
    model = Backbone(make_cnn())
    before = copy.deepcopy(model.net.state_dict())
    model.train()
    nn.Sequential(model).train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.features(torch.rand(2, 3, 32, 32), grad=True).map.requires_grad
    assert all(torch.equal(before[key], value) for key, value in model.net.state_dict().items())
    assert model.unmodified_weights
    assert model.state_to_save() == {}


def test_trained_backbone_has_gradients_only_where_they_are_used():
    model = Backbone(make_cfg(frozen=False, levels=[1], level_norm=False, pos_interp="dino"))
    assert model.training
    assert not model.features(torch.rand(1, 3, 40, 40)).map.requires_grad
    found = model.features(torch.rand(1, 3, 40, 40), grad=True, attention=True, block=1)
    found.map.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert unused == {name for name, _ in model.named_parameters() if name.startswith(("net.blocks.2.", "net.norm."))}
    assert model.state_to_save().keys() == model.state_dict().keys()
    assert not model.unmodified_weights
    cnn = Backbone(make_cnn(frozen=False, levels=[1, 4]))
    cnn.features(torch.rand(2, 3, 32, 32), grad=True).levels[1].sum().backward()
    assert all(parameter.grad is not None for parameter in cnn.parameters())
    assert cnn.net.bn1.training


@pytest.mark.parametrize("make", [make_cfg, make_cnn])
def test_features_made_under_inference_mode_can_be_trained_on(make):
    model = Backbone(make())
    with torch.inference_mode():
        found = model.features(torch.rand(1, 3, 32, 32), attention=model.has_attention)
    assert not found.map.is_inference()
    head = nn.Conv2d(model.channels[-1], 2, 1)
    head(found.map).square().sum().backward()
    assert (head.weight.grad != 0).any()
    if model.has_attention:
        assert not found.attention.is_inference()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_of_the_frozen_pass(precision):
    exact = make_transformer("vit_tiny_patch16_224")
    fast = make_transformer("vit_tiny_patch16_224", precision=precision)
    seen = []
    fast.net.blocks[0].attn.qkv.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    images = torch.rand(1, 3, 32, 32)
    one, other = exact.features(images, attention=True), fast.features(images, attention=True, qkv=True)
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    for tensor in (other.map, other.cls, other.attention, other.qkv):
        assert tensor.dtype == torch.float32
    assert torch.allclose(one.map, other.map, atol=0.1)
    assert not torch.equal(one.map, other.map)
    assert exact.features_key != fast.features_key
    assert exact.fingerprint == fast.fingerprint


def test_float32_holds_inside_autocast():
    model = make_transformer("vit_tiny_patch16_224")
    images = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.features(images, attention=True)
    expected = model.features(images, attention=True)
    assert torch.equal(found.map, expected.map)
    assert torch.equal(found.attention, expected.attention)


# ---- training -----------------------------------------------------------------------------------------------------


def test_hidden_patches_leave_the_embedding_as_the_token():
    model = make_transformer("vit_tiny_patch16_224", frozen=False)
    images, token = torch.rand(2, 3, 32, 32), nn.Parameter(torch.randn(32))
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    plain = model.features(images, grad=True).map
    assert torch.equal(model.features(images, grad=True, hidden=(mask, token)).map, plain)
    mask[0, 1, 2] = True
    seen = []
    handle = model.net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    one = model.features(images, grad=True, hidden=(mask, token)).map
    changed = images.clone()
    changed[0, :, 8:16, 16:24] = 0.9  # what lies under the mask is not seen
    assert torch.allclose(model.features(changed, grad=True, hidden=(mask, token)).map, one)
    handle.remove()
    position = model.net.pos_embed[0, 1 + 1 * 4 + 2]
    assert torch.allclose(seen[0][0, 1 + 1 * 4 + 2], token + position, atol=1e-6)
    assert torch.equal(one[1], plain[1])
    one.sum().backward()
    assert token.grad.abs().sum() > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())


def test_training_in_bfloat16_on_a_cpu_leaves_the_fused_kernel_and_comes_back():
    model = make_transformer("vit_tiny_patch16_224", frozen=False)
    images, used = torch.rand(2, 3, 32, 32), []
    attn = model.net.blocks[0].attn
    handle = attn.register_forward_pre_hook(lambda *_: used.append(attn.fused_attn))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model.features(images, grad=True).map
        fused = model.features(images).map
    model.features(images, grad=True)
    handle.remove()
    assert used == [False, True, True]
    assert (plain - fused).abs().max() < 0.05 * fused.abs().max()


@pytest.mark.parametrize("transformer", [True, False])
def test_exported_weights_are_read_back(transformer, tmp_path):
    def make(**changes):
        return Backbone((make_cfg if transformer else make_cnn)(frozen=False, **changes))

    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.rand_like(weight))
    save_file({key: value.contiguous() for key, value in model.exported().items()}, tmp_path / "w.safetensors")
    again = make(weights=str(tmp_path / "w.safetensors"))
    images = torch.rand(1, 3, 32, 32)
    for one, two in zip(model.eval().features(images).levels, again.eval().features(images).levels, strict=True):
        assert torch.equal(one, two)


# ---- two output strides, batch norms ------------------------------------------------------------------------------


def test_a_trained_network_has_another_output_stride_in_evaluation():
    """Cell for cell the network that timm builds for that stride, with the trained weights; and back again."""
    cfg = {"frozen": False, "output_stride": 16}
    model = Backbone(make_cnn(**cfg, eval_output_stride=8))
    other = Backbone(make_cnn(**{**cfg, "output_stride": 8}))
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 64, 96)
    assert model.features(images).map.shape[-2:] == (4, 6)
    model.eval()
    assert model.features(images).map.shape[-2:] == (8, 12)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.features(images).map, other.eval().features(images).map)
    assert model.train().features(images).map.shape[-2:] == (4, 6)


def test_a_second_output_stride_that_cannot_be_had():
    with pytest.raises(ConfigError) as caught:
        Backbone(make_cnn(frozen=True, output_stride=16, eval_output_stride=8))
    assert str(caught.value) == (
        "backbone.eval_output_stride=8: a frozen backbone has one stride; set it to null and backbone.output_stride=8"
    )


def test_frozen_norms_keep_their_statistics():
    model = Backbone(make_cnn(frozen=False, freeze_norms=True)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.features(torch.rand(2, 3, 64, 64), grad=True).map.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.net.layer4[0].bn1.weight.grad is not None
    model = Backbone(make_cnn(frozen=False)).train()
    model.features(torch.rand(2, 3, 64, 64))
    assert any(not torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_synchronised_norms_are_the_same_network(name):
    """The same weights under the same names, and the same features; the activations inside timm's norms stay."""
    model = Backbone(make_cnn(timm=name, create={}, frozen=False)).eval()
    images = torch.rand(1, 3, 64, 64)
    before, names = model.features(images).map, list(model.state_dict())
    weights = list(model.parameters())
    assert synchronise_norms(model)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
    assert list(model.state_dict()) == names
    assert all(one is two for one, two in zip(weights, model.parameters(), strict=True))
    assert torch.allclose(model.features(images).map, before, atol=1e-5)
    assert not synchronise_norms(nn.Linear(2, 2))
