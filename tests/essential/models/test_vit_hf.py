"""Image encoders of Hugging Face and timm give their own tokens, through the forward of the native one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vla_foundry.models import create_model
from vla_foundry.params.models.vit import ViTHFParams

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
# name -> class, config, tokens before the patches, block, and what its tokens do not depend on
FAMILIES: dict[str, tuple[Any, Any, int, str, str]] = {
    "siglip": (
        SiglipVisionModel,
        SiglipVisionConfig,
        0,
        "SiglipEncoderLayer",
        "model.head.",
    ),  # no head in newer transformers
    "clip": (CLIPVisionModel, CLIPVisionConfig, 1, "CLIPEncoderLayer", "post_layernorm"),
    "dinov2": (Dinov2Model, Dinov2Config, 1, "Dinov2Layer", "mask_token"),
    "vit": (ViTModel, ViTConfig, 1, "ViTLayer", "pooler"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel, str]:
    torch.manual_seed(0)
    model_class, config_class, *_ = FAMILIES[request.param]
    original = model_class(config_class(**SIZES)).eval()
    folder = str(tmp_path_factory.mktemp(request.param))
    original.save_pretrained(folder)
    return request.param, original, folder


def load(folder: str, **changes: Any) -> Any:
    return create_model(ViTHFParams(hf_pretrained=folder, **changes)).eval()


def random_images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_tokens_are_those_of_the_original(saved: tuple[str, PreTrainedModel, str]) -> None:
    name, original, folder = saved
    model, images = load(folder), random_images(2, 2, 3, 28, 28)
    tokens = model(images)
    assert torch.equal(tokens.flatten(0, 1), original(images.flatten(0, 1)).last_hidden_state)
    assert model.hidden_dim == 32
    assert model.image_size == 28
    assert model.num_prefix_tokens == FAMILIES[name][2]
    assert tokens.shape[2] == model.num_prefix_tokens + 16
    assert [type(block).__name__ for block in model.list_blocks()] == [FAMILIES[name][3]] * 2
    assert model(random_images(1, 3, 42, 42)).shape == (1, 36 + model.num_prefix_tokens, 32)


def test_every_trained_weight_gets_a_gradient(saved: tuple[str, PreTrainedModel, str]) -> None:
    name, _, folder = saved
    model = load(folder)
    model(random_images(2, 3, 28, 28)).square().sum().backward()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert frozen == [weight for weight, _ in model.named_parameters() if FAMILIES[name][4] in weight]


def test_a_model_made_on_the_meta_device_is_whole_once_it_has_memory(saved: tuple[str, PreTrainedModel, str]) -> None:
    name, _, folder = saved
    with torch.device("meta"):
        model: Any = create_model(ViTHFParams(hf_pretrained=folder), load_pretrained=False)
    model.to_empty(device="cpu")
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    other = load(folder)
    model.load_state_dict(other.state_dict())
    images = random_images(2, 3, 28, 28)
    assert torch.equal(model.eval()(images), other(images)), name


def test_the_saved_architecture_is_enough(saved: tuple[str, PreTrainedModel, str], tmp_path: Path) -> None:
    _, _, folder = saved
    model = load(folder)
    model.save_files(tmp_path)
    again: Any = create_model(ViTHFParams(hf_pretrained=str(tmp_path)), load_pretrained=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(random_images(1, 3, 28, 28)), model(random_images(1, 3, 28, 28)))


@pytest.mark.parametrize(
    ("name", "tokens", "prefix", "blocks"),
    [("vit_tiny_patch16_224", 17, 1, 12), ("vit_base_patch16_siglip_224", 16, 0, 12), ("resnet10t", 4, 0, 4)],
)
def test_encoders_of_timm(name: str, tokens: int, prefix: int, blocks: int) -> None:
    pytest.importorskip("timm")
    size = None if name.startswith("resnet") else 64
    with torch.device("meta"):
        model: Any = create_model(ViTHFParams(hf_pretrained=f"timm:{name}", hf_load_weights=False, img_size=size))
        out = model(torch.empty(2, 3, 64, 64))
    assert out.shape == (2, tokens, model.hidden_dim)
    assert model.num_prefix_tokens == prefix
    assert len(model.list_blocks()) == blocks


def test_what_is_no_image_encoder_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vit\.hf_pretrained '.*nothing' cannot be loaded") as caught:
        load(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"model\.vit\.hf_pretrained 'timm:nothing' cannot be loaded"):
        load("timm:nothing", hf_load_weights=False)


def test_only_weights_that_tokens_depend_on_must_be_there(saved: tuple[str, PreTrainedModel, str]) -> None:
    _, _, folder = saved
    broken = Path(f"{folder}_broken")
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    tensors = load_file(broken / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "pooler" not in key and ".head." not in key}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    create_model(ViTHFParams(hf_pretrained=str(broken)))
    weight = next(key for key in kept if "layer" in key and key.endswith("weight"))
    del kept[weight]
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.vit\.hf_pretrained .*1 weights are missing.*model\.vit\.hf_new_weights"
    ):
        create_model(ViTHFParams(hf_pretrained=str(broken)))


class Tied(torch.nn.Module):
    """An encoder whose weight has two names, the first of which the tokens do not depend on."""

    num_prefix_tokens, default_cfg = 0, {"input_size": (3, 4, 4)}

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.head = torch.nn.Linear(16, 3)
        self.patches = torch.nn.Linear(16, 3)
        self.patches.weight = self.head.weight

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels.flatten(2))


def test_a_tied_weight_is_trained_if_the_tokens_depend_on_any_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", lambda name, **_: Tied())
    model = create_model(ViTHFParams(hf_pretrained="timm:tied"))
    trained = {name for name, each in model.named_parameters(remove_duplicate=False) if each.requires_grad}
    assert trained == {"model.head.weight", "model.patches.weight", "model.patches.bias"}
    model(torch.ones(1, 3, 4, 4)).sum().backward()
