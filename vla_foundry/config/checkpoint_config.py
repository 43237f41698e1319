"""The model type of a checkpoint, read from the config that its run saved."""

import posixpath

from vla_foundry.config.tree import TYPE_KEY, Branch, Leaf, Scalar
from vla_foundry.config.yaml_source import load_config
from vla_foundry.run_folder import MODEL_CONFIG_NAME
from vla_foundry.storage.uri import is_remote

# a checkpoint lies at most this deep in its run's folder (run/checkpoints/step_N/model.safetensors)
_DEPTH = 4


def find_model_config(location: str) -> str | None:
    """Return the config_model.yaml of the run that a local checkpoint belongs to, or None."""
    folder = location.rstrip("/")
    for _ in range(_DEPTH):
        candidate = posixpath.join(folder, MODEL_CONFIG_NAME)
        try:
            with open(candidate, "rb"):
                return candidate
        except OSError:
            folder = posixpath.dirname(folder) or "."
    return None


def read_checkpoint_type(location: str) -> str | None:
    """Return the model type in the config of a local checkpoint; None if there is none."""
    path = None if is_remote(location) else find_model_config(location)
    tree = load_config(path) if path is not None else None
    node = tree.children.get(TYPE_KEY) if isinstance(tree, Branch) else None
    return node.value.text if isinstance(node, Leaf) and isinstance(node.value, Scalar) else None
