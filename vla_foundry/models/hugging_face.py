"""What all Hugging Face models share here: blocks, weights, token tables and fp32 buffers."""

import copy
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from vla_foundry.batch import LossOutput
from vla_foundry.models.losses import dense_language_model_loss, language_model_loss
from vla_foundry.params.models.roles import PublishedParams, count_positions
from vla_foundry.storage.hub import loading_published
from vla_foundry.world import is_first_process

# tables that older files hold and models compute
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|h\.\d+\.attn\.bias)$")
# kinds whose logits are what their config says
_KNOWN = {
    *("gemma", "gemma2", "idefics3", "llama", "mistral", "paligemma", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl"),
    "smolvlm",
}
# names shown in a message
_NUM_NAMED = 3
# settings under which logits are not hidden @ head.T, and the value that turns each off
_HEAD_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


class HuggingFaceModule(nn.Module):
    """Wraps a transformers model; parameters keep their names, prefixed with `model.`"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # typed Any because models have different attributes
        self.model: Any = model

    def init_weights(self) -> None:
        """Initialise all weights as transformers does for this architecture."""
        for module in self.model.modules():
            module._is_hf_initialized = False
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = False
        self.model.init_weights()

    def blocks(self) -> list[nn.Module]:
        """Return the model's blocks in order, image encoder included."""
        return find_blocks(self.model)

    def save_files(self, folder: Path) -> None:
        """Write the architecture, so that a run loads without fetching the published model again.

        The tokens that end a text come from the published generation settings, which may list several.
        """
        config, generation = self.model.config, getattr(self.model, "generation_config", None)
        if generation is not None and generation.eos_token_id is not None:
            config = copy.deepcopy(config)
            config.eos_token_id = generation.eos_token_id
        config.save_pretrained(folder)

    def token_tables(self) -> list[str]:
        """Return the names of the weights that have one row per token."""
        ends: list[Any] = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        weights = {id(module.weight) for module in ends}
        return [name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in weights]

    def resize_token_embeddings(self, num_tokens: int, *, pad_to_multiple_of: int = 64) -> int:
        """Grow the token tables to hold `num_tokens` tokens (they never shrink); return the number of rows."""
        embedding: Any = self.model.get_input_embeddings()
        if num_tokens > embedding.weight.shape[0]:
            # initialise new rows as at the start, not around the mean of all rows: the covariance costs too much
            embedding = self.model.resize_token_embeddings(
                num_tokens, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False
            )
        return embedding.weight.shape[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HuggingFaceModule":
        # rotary frequencies and similar buffers stay fp32 when the model is cast to another dtype
        tables = [
            (module, name, table)
            for module in self.modules()
            for name, table in module._buffers.items()
            if table is not None and table.dtype == torch.float32 and name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for module, name, table in tables:
            moved = module._buffers[name]
            if moved is not None and moved.dtype != table.dtype:
                module._buffers[name] = table.to(moved.device)
        return self


class HuggingFaceLanguageModel(HuggingFaceModule):
    """Shared by language and image-text models: the loss, its head, and their sizes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.text_config: Any = model.config.get_text_config()
        longest = getattr(self.text_config, "max_position_embeddings", None) or 0
        self.max_seq_len: int | None = count_positions(self.text_config.to_dict()) or (longest if longest > 0 else None)
        self.has_plain_head = _has_plain_head(model)
        # set where blocks are compiled
        self.compiles_loss = False
        self._has_said = False

    @property
    def hidden_dim(self) -> int:
        """Return the width of hidden states."""
        return self.text_config.hidden_size

    def compute_loss(self, inputs: dict[str, Any], targets: Tensor, z_loss_coefficient: float) -> LossOutput:
        """Return the loss; `inputs` are transformers' keyword arguments."""
        if not self.has_plain_head:
            if not self._has_said:
                _note(f"{type(self.model).__name__} does more than project its logits, so its loss takes more memory.")
                self._has_said = True
            logits = self.model(**inputs).logits
            return dense_language_model_loss(logits, targets, z_loss_coefficient=z_loss_coefficient)
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.model.get_output_embeddings().weight
        options: dict[str, Any] = {"z_loss_coefficient": z_loss_coefficient, "is_compiled": self.compiles_loss}
        return language_model_loss(hidden, head, targets, **options)

    def count_flops(self, decoder: nn.Module, seq_len: int) -> float:
        """Return 6 FLOPs per matrix weight plus 12 L H K seq_len for attention; counts all experts of a mixture."""
        head = self.model.get_output_embeddings().weight
        ends = {id(head), id(self.model.get_input_embeddings().weight)}
        weights = sum(p.numel() for p in decoder.parameters() if p.ndim >= 2 and id(p) not in ends) + head.numel()
        return 6.0 * weights + 12.0 * _attention_width(self.text_config) * seq_len


@torch.no_grad()
def _has_plain_head(model: PreTrainedModel) -> bool:
    """Return True if logits are just the last hidden states times the head's weight: tried on three tokens.

    On the meta device, where nothing can be tried, the config decides, for kinds that have been tried.
    """
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    is_plain = getattr(head, "bias", None) is None and all(
        getattr(config, name, off) in (off, None) for name, off in _HEAD_SETTINGS.items()
    )
    if head.weight.is_meta:
        require_known(model, _KNOWN)
    if not is_plain or head.weight.is_meta:
        return is_plain
    # a soft cap shows in large logits only
    hook = head.register_forward_hook(lambda _1, _2, logits: 1024.0 * logits)
    try:
        with evaluating(model):
            tokens = {"input_ids": example_tokens(model, 3), "use_cache": False}
            logits, hidden = model(**tokens).logits, model.base_model(**tokens).last_hidden_state
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # its base model is something else
        return False
    finally:
        hook.remove()
    return is_close(logits, 1024.0 * torch.nn.functional.linear(hidden, head.weight))


def require_known(model: PreTrainedModel, kinds: Collection[str]) -> None:
    """Raise NotImplementedError if a model is deferred, but is of a kind that must be tried, for which it is whole."""
    if is_deferred() and model.config.model_type not in kinds:
        raise NotImplementedError(f"a {type(model).__name__} is tried on tokens")


def is_deferred() -> bool:
    """Return True if weights get their values later (training/deferred.py), and are on the meta device until then."""
    return torch.empty(1).is_meta and torch.get_default_device().type != "meta"


def example_tokens(model: PreTrainedModel, count: int) -> Int[Tensor, "1 T"]:
    """Return a row of token ids to try a model on."""
    table: Any = model.get_input_embeddings()
    return (torch.arange(5, 5 + count, device=table.weight.device) % table.weight.shape[0]).unsqueeze(0)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Return True if two tensors differ by no more than rounding."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and back on afterwards where it was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attention_width(config: PreTrainedConfig) -> int:
    """Return the summed width of the heads of all layers (L x H x K); 0 for a model without attention."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    width = config.hidden_size
    # models whose layers differ refuse to name one width
    with suppress(RuntimeError):
        width = num_heads * (getattr(config, "head_dim", None) or 0) or width
    return config.num_hidden_layers * (width if num_heads else 0)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a transformers model's blocks in order, image encoder included; of nested blocks, the outer ones.

    `_no_split_modules` alone is not enough: image-text models also list parts of blocks in it.
    """
    blocks: list[nn.Module] = []
    inner: set[nn.Module] = set()
    names = {name for part in model.modules() for name in (getattr(part, "_no_split_modules", None) or [])}
    for parent in model.modules():
        for block in parent if isinstance(parent, nn.ModuleList) else ():
            is_block = isinstance(block, GradientCheckpointingLayer) or type(block).__name__ in names
            if is_block and block not in inner:
                blocks.append(block)
                inner.update(block.modules())
    return blocks


def select_states(
    hidden_states: tuple[Tensor, ...], num_states: int, at: Int[Tensor, " B"] | None
) -> list[Float[Tensor, "B S D"]]:
    """Return the last `num_states` hidden states; with `at`, only those of one token per row.

    Raises:
        ValueError: the model has fewer blocks.
    """
    if num_states >= len(hidden_states):
        raise ValueError(f"The last {num_states} layers are requested, but the model has {len(hidden_states) - 1}.")
    states = list(hidden_states[-num_states:])
    if at is None:
        return states
    rows = torch.arange(at.shape[0], device=at.device)
    return [state[rows, at].unsqueeze(1) for state in states]


def load_published_model(
    auto_class: Any,
    params: PublishedParams,
    *,
    load_pretrained: bool,
    config: PreTrainedConfig | None = None,
    key: str = "model.hf_pretrained",
    is_needed: Callable[[Any, str], bool] = lambda model, name: True,
) -> Any:
    """Build the model that `params.hf_pretrained` names, in fp32; code shipped with it is never run.

    Args:
        auto_class: the class of transformers that knows models of this kind.
        load_pretrained: load the published weights, unless the params say otherwise; False: initialise new ones.
        config: the model's own config, if it is not the published one.
        key: the name's place in the config, for messages.
        is_needed: (model, name) -> whether a weight affects what is computed; others may be missing.

    Raises:
        ValueError: the model does not exist, transformers does not support it, or weights are missing or have another
            shape.
    """
    name = params.hf_pretrained.removeprefix("hf://")
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    is_part = config is not None
    verbosity = logging.get_verbosity()
    with loading_published(f"{key} '{params.hf_pretrained}'"):
        config = config or AutoConfig.from_pretrained(name)
        if not (load_pretrained and params.hf_load_weights):
            return auto_class.from_config(config, **options)
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        logging.set_verbosity_error()  # its table of tensors is what is said below
        try:
            model, report = auto_class.from_pretrained(name, config=config, **options)
        finally:
            logging.set_verbosity(verbosity)
        if is_deferred():
            # weights that needed no other type lie in their files still
            model.to("meta").tie_weights()
    unknown = _find_unknown(model, report["unexpected_keys"], is_part=is_part)
    shapes = {key: f" (has shape {tuple(found)}, needs {tuple(own)})" for key, found, own in report["mismatched_keys"]}
    absent = {key: "" for key in sorted(report["missing_keys"]) if is_needed(model, key)} | shapes
    lost = [key for key in absent if not any(fnmatchcase(key, pattern) for pattern in params.hf_new_weights)]
    if lost:
        raise ValueError(
            f"{key} '{params.hf_pretrained}': {len(lost)} weights are missing, such as {lost[0]}{absent[lost[0]]}"
            + (f"; {len(unknown)} have unknown names, such as {unknown[0]}" if unknown else "")
            + f". To start them with new values, name them in {key.removesuffix('pretrained')}new_weights."
        )
    if unknown:
        _note(
            f"{key} '{params.hf_pretrained}': {len(unknown)} tensors that a {type(model).__name__} has no place for "
            f"are left out: {', '.join(unknown[:_NUM_NAMED])}{', ...' if len(unknown) > _NUM_NAMED else ''}"
        )
    return model


def _note(line: str) -> None:
    if is_first_process():
        sys.stderr.write(f"note: {line}\n")


def _find_unknown(model: PreTrainedModel, unexpected: Iterable[str], *, is_part: bool) -> list[str]:
    """Return the stored tensors that a model should have a place for; of a part, only those of its own modules."""
    own = {name.partition(".")[0] for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    found = {key: key.removeprefix(prefix).partition(".")[0] for key in unexpected if not _COMPUTED.search(key)}
    return sorted(key for key, first in found.items() if first in own or not is_part)
