"""The native image encoder: names, positions at other sizes, stems, initial weights, presets' sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vla_foundry.models import create_model
from vla_foundry.models.vit import ViT
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.models.vit import ViTParams


def create(**changes: Any) -> ViT:
    values = {"hidden_dim": 32, "inter_dim": 48, "n_heads": 4, "n_layers": 2, "patch_size": 7, "img_size": 28}
    torch.manual_seed(0)
    model = create_model(ViTParams(**{**values, **changes}))
    assert isinstance(model, ViT)
    return model


def random_images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_images_in_single_precision_are_encoded_in_that_of_the_weights(stem: str) -> None:
    model = create(patch_size=14, stem=stem).eval()
    images = random_images(2, 3, 28, 28)
    expected = model(images)
    found = model.double()(images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)


def test_state_dict_has_the_names_and_shapes_of_published_checkpoints() -> None:
    state = create(n_layers=1, cls_flag=True).state_dict()
    block = {
        **{f"{norm}.{name}": (32,) for norm in ("ln1", "ln2") for name in ("weight", "bias")},
        "attn.qkv_proj.weight": (96, 32),
        "attn.qkv_proj.bias": (96,),
        "attn.out_proj.weight": (32, 32),
        "attn.out_proj.bias": (32,),
        "mlp.fc1.weight": (48, 32),
        "mlp.fc1.bias": (48,),
        "mlp.fc2.weight": (32, 48),
        "mlp.fc2.bias": (32,),
    }
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "patch_embedding.cls_token": (1, 1, 32),
        "patch_embedding.position_embedding": (1, 17, 32),
        "patch_embedding.conv.weight": (32, 3, 7, 7),
        "patch_embedding.conv.bias": (32,),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "layer_norm.weight": (32,),
        "layer_norm.bias": (32,),
    }


def test_images_of_a_sample_are_encoded_as_if_each_were_alone() -> None:
    model, images = create(), random_images(2, 3, 3, 28, 28)
    tokens = model(images)
    assert tokens.shape == (2, 3, 16, 32)
    torch.testing.assert_close(tokens[1, 2], model(images[1, 2:])[0], rtol=1e-5, atol=1e-6)


def test_positions_are_exact_at_the_native_size_and_bicubic_elsewhere() -> None:
    embedding = create(cls_flag=True).patch_embedding
    assert embedding._positions(4, 4) is embedding.position_embedding
    wide = embedding._positions(4, 6)
    grid = embedding.position_embedding[:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(wide[:, 1:], expected.reshape(1, 24, 32))
    assert torch.equal(wide[:, :1], embedding.position_embedding[:, :1])


def test_smooth_positions_keep_their_places_at_another_size() -> None:
    embedding = create().patch_embedding
    with torch.no_grad():
        rows = (torch.arange(4.0) + 0.5) / 4
        embedding.position_embedding.copy_(rows.repeat_interleave(4)[None, :, None].expand(1, 16, 32))
    middle = embedding._positions(8, 8).view(8, 8, 32)[2:6, :, 0]
    torch.testing.assert_close(middle, ((torch.arange(2.0, 6.0) + 0.5) / 8)[:, None].expand(4, 8), rtol=0, atol=0.011)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_tokens_are_patches_row_by_row(stem: str) -> None:
    model = create(stem=stem, patch_size=8, img_size=64)
    pixels = random_images(16, 3, 64, 64).requires_grad_()
    tokens = model.patch_embedding(pixels)
    (gradient,) = torch.autograd.grad(tokens[:, 3 * 8 + 5].square().sum(), pixels)
    strength = gradient.square().sum((0, 1))
    # a convolutional stem sees a little beyond patch (3, 5), and its norms the whole image; the centre is the patch's
    rows, columns = strength.sum(1), strength.sum(0)
    centre = [(side * torch.arange(64.0)).sum().item() / strength.sum().item() for side in (rows, columns)]
    assert centre == pytest.approx([3 * 8 + 3.5, 5 * 8 + 3.5], abs=1.0)
    if stem == "patch":
        assert strength[24:32, 40:48].count_nonzero() == strength.count_nonzero() == 64
    assert model(random_images(2, 3, 29, 40)).shape == (2, 15, 32)


def test_the_convolutional_stem_halves_as_often_as_the_patch_is_even() -> None:
    shapes = {}
    for patch in (8, 12, 14):
        embedding = create(stem="conv", patch_size=patch, img_size=4 * patch).patch_embedding
        strides = [layer.stride[0] for layer in embedding.stem or [] if isinstance(layer, torch.nn.Conv2d)]
        shapes[patch] = (strides, tuple(embedding.conv.weight.shape[2:]))
        assert embedding(random_images(1, 3, 4 * patch, 4 * patch)).shape == (1, 16, 32)
    assert shapes == {8: ([2, 1, 2, 1, 2, 1], (1, 1)), 12: ([2, 1, 2, 1], (3, 3)), 14: ([2, 1], (7, 7))}


def test_initial_positions_are_as_large_as_other_weights() -> None:
    state = create(hidden_dim=128, img_size=112, stem="conv", patch_size=8).state_dict()
    assert state["patch_embedding.position_embedding"].std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(state["patch_embedding.position_embedding"].mean().item()) < 1e-3
    assert state["blocks.1.attn.qkv_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (state["blocks.1.mlp.fc2.bias"] == 0).all()


def test_dropout_acts_in_training_only() -> None:
    model, images = create(dropout=0.5), random_images(1, 3, 28, 28)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    assert torch.equal(model(images), create()(images))


def test_a_model_made_on_the_meta_device_is_whole_once_it_has_memory() -> None:
    with torch.device("meta"):
        model = create(cls_flag=True, stem="conv", patch_size=4)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    images = random_images(2, 3, 28, 28)
    assert torch.equal(model(images), create(cls_flag=True, stem="conv", patch_size=4)(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_pixel_shuffle_factor": 3}, "must divide the 4 patches along a side"),
        ({"n_heads": 5}, r"hidden_dim \(32\) must be a multiple of n_heads \(5\)"),
        ({"stem": "conv"}, r"patch_size \(7\) must be even"),
        ({"img_size": 6}, r"img_size \(6\) must be at least patch_size \(7\)"),
    ],
)
def test_params_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(**changes)


@pytest.mark.parametrize(
    ("name", "millions", "tokens"),
    [
        ("tiny", 0.254, 256),
        ("paligemma", 412.442, 256),
        ("smolvlm2_256m", 86.433, 256),
        ("smolvlm2_256m_224", 85.797, 196),
    ],
)
def test_presets_have_their_sizes(name: str, millions: float, tokens: int) -> None:
    params = load_params_from_yaml(ModelParams, f"config_presets/models/vit_{name}.yaml")
    with torch.device("meta"):
        model = create_model(params)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert params.image_inputs().img_num_tokens == tokens


def test_the_class_token_alone_is_the_first_of_all_tokens() -> None:
    images = random_images(2, 3, 28, 28)
    alone = create(cls_flag=True, output="class_token")(images)
    assert alone.shape == (2, 32)
    torch.testing.assert_close(alone, create(cls_flag=True)(images)[:, 0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"output 'class_token' needs a class token\. Set cls_flag true"):
        ViTParams(output="class_token")
