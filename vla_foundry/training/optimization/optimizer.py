"""AdamW or Muon with selective weight decay, gradient clipping, and an update that can be skipped on the device."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from vla_foundry.params.hparams import HyperParams, ParameterGroup
from vla_foundry.registry import match_names, summarize_names, unknown_name_message
from vla_foundry.training.distributed import local_shard
from vla_foundry.training.optimization.muon import MuonAdamW, is_for_muon

# modules whose `weight` maps features to features and therefore decays
_MATRIX_MODULES = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# parameters of other modules (the experts and router of a mixture) decay if they are matrices or stacks of matrices,
# unless the name of the parameter or its module says that it is something else
_NOT_MATRICES = re.compile(
    r"bias|norm|embed|pos(ition|_)|token|latent|quer(y|ies)\b|probe|scale|_table|_log| D$", re.IGNORECASE
)

# as in torch's clip_grad_norm_
_CLIP_EPS = 1e-6


def create_optimizer(
    model: nn.Module, params: HyperParams, lr: Tensor, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.AdamW:
    """Create fused AdamW over the trainable parameters, with weight decay on matrices only; or Muon beside it.

    Args:
        model: after it was sharded.
        lr: scalar on the parameters' device; `set_learning_rate` writes the learning rate into it.
        parameters: the model's, by the names that `hparams.lr_multipliers` uses.

    Raises:
        ValueError: nothing is trainable, a multiplier names no part of the model, a group has frozen weights only, or
            there is nothing that Muon would train.
    """
    decayed = decayed_parameters(model)
    own = _find_groups(params, parameters)
    multipliers = _find_multipliers(params.lr_multipliers, parameters)
    multipliers |= {name: group.lr / params.lr for name, group in own.items() if group.lr is not None}
    groups: dict[tuple[float, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            wd = own[name].wd if name in own else None
            decay = (params.wd if wd is None else wd) if parameter in decayed else 0.0
            is_muon = params.optimizer == "muon" and parameter in decayed and is_for_muon(name, parameter)
            # one kernel cannot take sharded and whole tensors together
            key = (decay, isinstance(parameter, DTensor), multipliers[name], is_muon)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError(
            "No weight of the model is trainable. Set freeze to false in at least one part of model, or in one of "
            "hparams.parameter_groups."
        )
    if params.optimizer == "muon" and not any(is_muon for *_, is_muon in groups):
        raise ValueError("hparams.optimizer muon: no matrix in a block of the model is trainable. Use adamw.")
    rates = {multiplier: lr if multiplier == 1.0 else torch.zeros_like(lr) for multiplier in multipliers.values()}
    orthogonalized_in = {"fp32": torch.float32, "fp64": torch.float64}.get(params.precision, torch.bfloat16)
    of_muon = {"momentum": params.muon_momentum, "dtype": orthogonalized_in}
    return {"adamw": torch.optim.AdamW, "muon": MuonAdamW}[params.optimizer](
        [
            {
                "params": members,
                "weight_decay": decay,
                "lr": rates[multiplier],
                "lr_multiplier": multiplier,
                "is_muon": is_muon,
                **(of_muon if is_muon else {}),
            }
            for (decay, _, multiplier, is_muon), members in groups.items()
        ],
        lr=lr,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        fused=True,
    )


def freeze_weights(model: nn.Module, params: HyperParams) -> None:
    """Freeze what `hparams.parameter_groups` freeze; call it before the model is distributed.

    Raises:
        ValueError: a group's pattern matches no weight, or another group takes all that it matches.
    """
    parameters = dict(model.named_parameters())
    for name, group in _find_groups(params, parameters).items():
        if group.freeze:
            parameters[name].requires_grad_(False)


def _find_groups(params: HyperParams, parameters: Mapping[str, nn.Parameter]) -> dict[str, ParameterGroup]:
    """Return the group of each parameter that has one: the last whose patterns match its name."""
    found: dict[str, str] = {}
    for key, group in params.parameter_groups.items():
        names = match_names(group.patterns, parameters, f"hparams.parameter_groups.{key}.patterns", "weight")
        found |= dict.fromkeys(names, key)
    for key, group in params.parameter_groups.items():
        members = [name for name, owner in found.items() if owner == key]
        path = f"hparams.parameter_groups.{key}"
        if not members:
            raise ValueError(f"{path} has no weights left: later groups match all of them too. Put it after them.")
        if not group.freeze and not any(parameters[name].requires_grad for name in members):
            raise ValueError(f"{path} has frozen weights only ({summarize_names(members)}). Remove it, or a freeze.")
    return {name: params.parameter_groups[key] for name, key in found.items()}


def _find_multipliers(given: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return each parameter's multiplier: the one given for the longest prefix of its name, else 1."""
    multipliers = dict.fromkeys(names, 1.0)
    for part in sorted(given, key=len):
        members = [name for name in multipliers if name == part or name.startswith(f"{part}.")]
        if not members:
            parts = sorted({name.partition(".")[0] for name in multipliers})
            raise ValueError(unknown_name_message("part of the model in hparams.lr_multipliers", part, parts))
        multipliers |= dict.fromkeys(members, given[part])
    return multipliers


def set_learning_rate(optimizer: torch.optim.AdamW, lr: Tensor) -> None:
    """Set the rates of groups with a multiplier to `lr` times it, without a host sync."""
    for group in optimizer.param_groups:
        if group["lr_multiplier"] != 1.0:
            torch.mul(lr, group["lr_multiplier"], out=group["lr"])


def decayed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that weight decay applies to: maps between features, a mixture's experts among them.

    Embeddings, an output head tied to one, norms, biases and all other parameters are excluded.
    """
    matrices: set[nn.Parameter] = set()
    embeddings: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embeddings.add(module.weight)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, _MATRIX_MODULES):
            matrices.add(module.weight)  # pyright: ignore[reportArgumentType]
        else:
            own = module.named_parameters(recurse=False)
            kind = type(module).__name__
            matrices.update(parameter for name, parameter in own if _is_matrix(parameter, f"{kind} {name}"))
    return matrices - embeddings


def _is_matrix(parameter: nn.Parameter, name: str) -> bool:
    """Whether a parameter of a module of unknown kind is a matrix between features, or a stack of such matrices."""
    has_one_expert = parameter.ndim == 3 and parameter.shape[0] == 1 and "expert" in name.lower()
    smallest = min(parameter.shape[1:] if has_one_expert else parameter.shape, default=0)
    return parameter.ndim >= 2 and smallest > 1 and _NOT_MATRICES.search(name) is None


def describe_groups(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], lr: float) -> list[str]:
    """Return a table of what is trained how: one line for each weight decay and peak learning rate, one for the frozen.

    Args:
        lr: the peak learning rate of groups without a multiplier.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    rows: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        key = f"{'Muon, ' * group['is_muon']}weight decay {group['weight_decay']:g}, lr {lr * group['lr_multiplier']:g}"
        rows.setdefault(key, []).extend(names[parameter] for parameter in group["params"])
    if frozen := [name for name, parameter in parameters.items() if not parameter.requires_grad]:
        rows["frozen"] = frozen
    return [
        f"{key}: {len(row)} tensors, {sum(parameters[name].numel() for name in row):,} weights ({summarize_names(row)})"
        for key, row in rows.items()
    ]


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Collective: call on every rank. Return the L2 norm of all gradients, a scalar on the parameters' device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norms = [get_total_norm(whole)] if whole else []
    if sharded:
        norm = get_total_norm(sharded)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return (
        norms[0]
        if len(norms) == 1
        else torch.linalg.vector_norm(torch.stack([norm.to(norms[-1].device) for norm in norms]))
    )


def step_optimizer(optimizer: torch.optim.AdamW, skip: Tensor, norm: Tensor, max_norm: float | None) -> None:
    """Update the weights from gradients of norm `norm`, clipped to `max_norm`, without a host sync.

    If the scalar `skip` is 1, leave weights, moments and step counts unchanged. Fused AdamW reads both like a gradient
    scaler's `found_inf` and `grad_scale`, so that gradients are not scaled in a pass of their own.
    """
    scale = None if max_norm is None else ((norm + _CLIP_EPS) / max_norm).clamp(min=1.0)
    if scale is not None and scale.dtype == torch.float64:
        # the kernel takes a scale in single precision
        gradients = [
            local_shard(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        torch._foreach_div_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
        scale = None
    optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = None if scale is None else scale.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
