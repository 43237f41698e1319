"""Names are found in the source of the package, so that a new file registers itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vla_foundry.registry import Registry

PACKAGE = Path(__file__).resolve().parents[2] / "vla_foundry"

PARAMS = '''
from dataclasses import dataclass, field

from vla_foundry.params.models.roles import register_model_params
from vla_foundry.params.models.action_heads import ActionHeadParams, NoiseParams
from vla_foundry.params.models.backbones import BackboneParams
from vla_foundry.params.models.roles import ModelParams


@register_model_params("new_model")
@dataclass(frozen=True, kw_only=True)
class NewModelParams(ModelParams):
    """A new model."""

    # its width
    width: int = 3


@register_model_params("new_head")
@dataclass(frozen=True, kw_only=True)
class NewHeadParams(ActionHeadParams):
    """A new head."""


@register_model_params("new_backbone")
@dataclass(frozen=True, kw_only=True)
class NewBackboneParams(BackboneParams):
    """A new backbone."""


@register_model_params("new_noise")
@dataclass(frozen=True, kw_only=True)
class NewNoiseParams(NoiseParams):
    """A new noise process."""
'''

MODEL = """
from torch import nn

from vla_foundry.models.registry import register_batch_handler, register_model


@register_model("new_model")
def create_new_model(params, load_pretrained=True):
    return nn.Linear(params.width, 1)


@register_batch_handler("new_model")
class NewBatchHandler:
    def __init__(self, params):
        self.width = params.model.width
"""


HEAD = """
from torch import nn

from vla_foundry.models.action_heads.action_head import ActionHead, register_action_head


@register_action_head("new_head")
def create_new_head(params, widths):
    head = ActionHead()
    head.linear = nn.Linear(widths.conditioning_dim, widths.action_dim)
    return head
"""

BACKBONE = """
from vla_foundry.models.backbones.backbone import Backbone, register_backbone, register_observation


@register_backbone("new_backbone")
def create_new_backbone(params, load_pretrained=True):
    backbone = Backbone()
    backbone.conditioning_dim = 7
    return backbone


@register_observation("new_backbone")
def prepare_observation(params, batch, device):
    return {}
"""

NOISE = """
from vla_foundry.models.action_heads.noise import register_noise


@register_noise("new_noise")
def create_new_noise(params):
    return "a process"
"""

USE = """
import sys
from vla_foundry.config.command_line import parse
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params import TrainExperimentParams

def read(*words):
    return parse(TrainExperimentParams, ["--data.type", "text", *words], prog="train").params

params = read("--model.type", "new_model", "--model.width", "5")
assert "torch" not in sys.modules
print(create_model(params.model).in_features, create_batch_handler(params).width)
words = ["--model.type", "diffusion_policy", "--model.action_dim", "2", "--model.proprioception_dim", "0"]
words += ["--model.vision_language_backbone.type", "new_backbone", "--model.action_head.type", "new_head"]
print(create_model(read(*words).model).action_head.linear)
from vla_foundry.models.action_heads.noise import NOISES
print(NOISES.get("new_noise")(None))
unused = {f"vla_foundry.models.{name}" for name in ("transformer_hf", "vlm", "backbones.clip")}
print(sorted(unused & set(sys.modules)))
"""


def test_files_added_to_the_package_register_themselves(tmp_path: Path) -> None:
    copy = tmp_path / "vla_foundry"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "config_presets"))
    added = {
        "params/models/new.py": PARAMS,
        "models/new_model.py": MODEL,
        "models/action_heads/new_head.py": HEAD,
        "models/backbones/new_backbone.py": BACKBONE,
        "models/action_heads/new_noise.py": NOISE,
    }
    for name, text in added.items():
        (copy / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = ["5 5", "Linear(in_features=7, out_features=2, bias=True)", "a process", "[]"]
    assert done.stdout.splitlines() == expected


def test_the_search_takes_whole_lines_only_and_an_unknown_name_gets_all_that_were_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "searched_package"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").touch()
    (package / "inner" / "thing.py").write_text(
        '"""Say @register_thing("in_prose"):\n\n    @register_thing("in_an_example")\n"""\n'
        "from things import register_thing\n\n"
        '@register_thing("first")\n@register_thing("second")\ndef thing(): ...\n',
        encoding="utf-8",
    )
    (package / "broken.py").write_text("raise AssertionError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[object] = Registry("a.thing", package="searched_package", decorator="register_thing")
    assert registry.names() == ["first", "second"]
    message = r"^a\.thing 'secnd' is unknown\. Did you mean 'second'\? Registered: first, second\.$"
    with pytest.raises(ValueError, match=message):
        registry.get("secnd")


def test_a_name_is_registered_once() -> None:
    registry: Registry[int] = Registry("a.thing", package="vla_foundry.models", decorator="register_nothing")
    registry.register("one")(1)
    registry.register("one")(1)
    assert registry.names() == ["one"]
    with pytest.raises(ValueError, match=r"^a\.thing 'one' is registered twice\. Choose another name\.$"):
        registry.register("one")(2)


def test_lazy_packages_list_their_public_names_for_completion() -> None:
    code = "import sys, importlib\n"
    code += "for name in ('data', 'inference', 'models', 'params', 'robotics'):\n"
    code += "    package = importlib.import_module(f'vla_foundry.{name}')\n"
    code += "    assert set(package.__all__) <= set(dir(package)), name\n"
    code += "    assert not hasattr(package, 'nothing')\n"
    code += "assert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
