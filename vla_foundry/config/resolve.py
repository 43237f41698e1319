"""Fill every derived value in one pure pass, then check that the sections of a run fit together."""

from dataclasses import dataclass, fields, replace
from typing import Any

from vla_foundry.config.base import BaseParams
from vla_foundry.config.derivation import Derived, Facts, Unavailable
from vla_foundry.params import checks
from vla_foundry.params.experiment import TrainExperimentParams

# later sections may use what earlier ones derived; data follows the model it is for, and the model the data's widths
_ORDER = ("hparams", "distributed", "ema", "model", "data", "model")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Params with every derived value that could be had."""

    params: TrainExperimentParams
    # config path of each derived value -> what it follows from
    sources: dict[str, str]
    # config path of each value that could not be derived -> what it would take
    unresolved: dict[str, str]
    # what is no error, but worth saying
    notices: list[str]


def resolve(params: TrainExperimentParams, facts: Facts) -> TrainExperimentParams:
    """Return the params with every derived value filled in, checked against each other. Pure.

    Raises:
        ValueError: a value can not be derived, or sections do not fit together; one line with config paths.
    """
    return require_resolved(resolve_known(params, facts))


def require_resolved(resolved: Resolved) -> TrainExperimentParams:
    """Return the params of a derivation that left nothing open.

    Raises:
        ValueError: a value could not be derived; the message says what it needs.
    """
    for path, needs in resolved.unresolved.items():
        raise ValueError(f"{path} can not be resolved: it needs {needs}.")
    return resolved.params


def resolve_known(params: TrainExperimentParams, facts: Facts) -> Resolved:
    """Resolve like `resolve`, leaving what can not be known as it is.

    Raises:
        ValueError: sections do not fit together, as far as that is known.
    """
    sources: dict[str, str] = {}
    unresolved: dict[str, str] = {}
    for name in _ORDER:
        # what a section's first turn left open, its second may fill
        unresolved = {path: needs for path, needs in unresolved.items() if not path.startswith(f"{name}.")}
        section = _derive(getattr(params, name), params, facts, name, sources, unresolved)
        params = replace(params, **{name: section})
    params = _fill(params, checks.derive_budget(params, facts), "", sources, unresolved)
    notices = checks.check_budget(params, facts)
    for name in dict.fromkeys(_ORDER):
        notices += _check(getattr(params, name), params, facts, name)
    checks.check_data(params, facts)
    checks.check_tokens(params, facts)
    return Resolved(params=params, sources=sources, unresolved=unresolved, notices=notices)


def _derive(
    section: Any,
    root: TrainExperimentParams,
    facts: Facts,
    path: str,
    sources: dict[str, str],
    unresolved: dict[str, str],
) -> Any:
    """Return the section with derived values, and the sections in it likewise."""
    section = _fill(section, section.derive(root, facts), path, sources, unresolved)
    inner: dict[str, Any] = {}
    for item in fields(section):
        value: Any = getattr(section, item.name)
        below = f"{path}.{item.name}"
        if isinstance(value, BaseParams):
            inner[item.name] = _derive(value, root, facts, below, sources, unresolved)
        elif _is_dict_of_sections(value):
            parts: dict[str, Any] = value
            inner[item.name] = {
                name: _derive(part, root, facts, f"{below}.{name}", sources, unresolved) for name, part in parts.items()
            }
    return replace(section, **inner) if inner else section


def _is_dict_of_sections(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(part, BaseParams) for part in value.values())


def _fill(
    section: Any, derived: dict[str, Derived], path: str, sources: dict[str, str], unresolved: dict[str, str]
) -> Any:
    values = {}
    for name, item in derived.items():
        full = f"{path}.{name}" if path else name
        if isinstance(item.value, Unavailable):
            unresolved[full] = item.value.needs
        else:
            values[name] = item.value
            sources[full] = item.source
    return replace(section, **values) if values else section


def _check(section: BaseParams, root: TrainExperimentParams, facts: Facts, path: str) -> list[str]:
    notices = section.check(root, facts, path)
    for item in fields(section):
        value: Any = getattr(section, item.name)
        if _is_dict_of_sections(value):
            for name, part in value.items():
                notices = notices + _check(part, root, facts, f"{path}.{item.name}.{name}")
        elif isinstance(value, BaseParams):
            notices = notices + _check(value, root, facts, f"{path}.{item.name}")
    return notices
