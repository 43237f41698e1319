"""Params of every model; importing this registers them."""

from vla_foundry.params.models import transformer as transformer
