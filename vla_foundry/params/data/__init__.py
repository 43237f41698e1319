"""Params of every data type; importing this registers them."""

from vla_foundry.params.data import image_caption as image_caption
from vla_foundry.params.data import robotics as robotics
from vla_foundry.params.data import text as text
