"""Params of every model; importing this registers them."""

from vla_foundry.params.models import diffusion_policy as diffusion_policy
from vla_foundry.params.models import transformer as transformer
from vla_foundry.params.models import vit as vit
from vla_foundry.params.models import vlm as vlm
