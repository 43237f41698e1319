"""Params of a pipeline's stages: which functions run on a sample, by what names, in what order."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vla_foundry.config.command_line import agreed_plugins
from vla_foundry.config.schema import BaseParams, Name, Size
from vla_foundry.registry import Registry, unknown_name_message

# stages of users by name: a function `sample -> sample`, or a class or factory of such functions
STAGES: Registry[Callable[..., Any]] = Registry(
    "stage", package="vla_foundry.data.pipelines", decorator="register_stage"
)
register_stage = STAGES.register

# WebDataset's stages that look at one sample at a time
WEBDATASET_STAGES = ("associate", "decode", "map", "map_dict", "rename", "rename_keys", "select", "xdecode")
# these take functions, and nothing else
_TAKE_FUNCTIONS = ("map", "map_dict", "select")
_SHUFFLE = "its order depends on what a process has read before. data.shuffle and data.shuffle_buffer_size shuffle"
_REFUSED = {
    "shuffle": _SHUFFLE,
    "detshuffle": _SHUFFLE,
    "rsample": "it draws without a key. Use wds.select and a function that takes a `generator`",
}


def webdataset_stage(use: str) -> str | None:
    """Return the name of the WebDataset stage that `use` names (`wds.map`); None: it names something else.

    Raises:
        ValueError: the stage does not fit into an exact pipeline; the message says why.
    """
    package, _, name = use.rpartition(".")
    if package not in ("wds", "webdataset"):
        return None
    if name not in WEBDATASET_STAGES:
        reason = _REFUSED.get(name, "it is not a stage that takes one sample at a time")
        known = ", ".join(f"wds.{stage}" for stage in WEBDATASET_STAGES)
        raise ValueError(f"wds.{name} does not fit into a pipeline: {reason}. WebDataset's stages here: {known}.")
    return name


@dataclass(frozen=True, kw_only=True)
class StageParams(BaseParams):
    """A stage to insert into a pipeline, or a change of the stage of that name."""

    # what runs: a registered stage, module.name of a plug-in, or a WebDataset stage (wds.map); null: as it is
    use: Name | None = None
    # arguments of the class or of the WebDataset stage; module.name of a plug-in stands for that function
    args: list[Any] = field(default_factory=list)
    # keyword arguments, likewise
    kwargs: dict[str, Any] = field(default_factory=dict)
    # insert or move it in front of this stage
    before: Name | None = None
    # insert or move it behind this stage
    after: Name | None = None
    # leave this stage out
    remove: bool = False
    # most samples that it makes of one
    samples: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.before is not None and self.after is not None:
            raise ValueError(f"before ({self.before}) and after ({self.after}) are both given. Give one.")
        if self.remove and (self.use or self.before or self.after):
            raise ValueError("remove is true, so that use, before and after have no effect. Give one or the other.")
        if self.use is None and (self.args or self.kwargs or self.samples > 1):
            raise ValueError("use is missing: args, kwargs and samples belong to a function. Name it.")
        if self.use is not None:
            try:
                webdataset_stage(self.use)
            except ValueError as error:
                raise ValueError(f"use: {error}") from None

    def load(self) -> tuple[Callable[..., Any] | None, list[Any], dict[str, Any]]:
        """Return the function to use (None: a WebDataset stage), its arguments and its keyword arguments.

        Raises:
            ValueError: a function is unknown, or is not one of a plug-in that the user has named.
        """
        assert self.use is not None, "a stage of the user's"
        stage = webdataset_stage(self.use)
        must = stage in _TAKE_FUNCTIONS
        args = [_find_argument(value, must=must) for value in self.args]
        kwargs = {name: _find_argument(value, must=must and name != "handler") for name, value in self.kwargs.items()}
        return None if stage is not None else find_function(self.use), args, kwargs


def _find_argument(value: Any, *, must: bool) -> Any:
    """Return the function that an argument names, or the argument itself, if it names none and need not."""
    if isinstance(value, str) and (must or _plugin_of(value) is not None):
        return find_function(value)
    if must:
        raise ValueError(f"{value!r} is not the name of a function, as module.name of a plug-in.")
    return value


def _plugin_of(name: str) -> str | None:
    module = name.rpartition(".")[0]
    return next((plugin for plugin in agreed_plugins() if module == plugin or module.startswith(f"{plugin}.")), None)


def find_function(name: str) -> Callable[..., Any]:
    """Return a registered stage, or a function or class that a plug-in defines (`module.name`).

    Nothing else can be named, because a config may come with data: whoever names a plug-in agrees to its code.

    Raises:
        ValueError: there is no such stage, plug-in or function.
    """
    module, dot, attribute = name.rpartition(".")
    if not dot or name in STAGES.names():
        return STAGES.get(name)
    if _plugin_of(name) is None:
        named = ", ".join(agreed_plugins()) or "none"
        raise ValueError(
            f"'{name}' is not in a plug-in that you named ({named}). A stage is a function of a module of your own: "
            "write one, and name its module with --plugins."
        )
    found = getattr(sys.modules.get(module), attribute, None)
    own = [key for key, value in vars(sys.modules.get(module, object)).items() if _is_own(value, module)]
    if not _is_own(found, module):
        raise ValueError(unknown_name_message(f"function of {module}", attribute, sorted(own)))
    assert callable(found), "own functions are callable"
    return found


def _is_own(value: Any, module: str) -> bool:
    """True for a function or class that the plug-in itself defines, not one that it imports from elsewhere."""
    package = module.partition(".")[0]
    return callable(value) and str(getattr(value, "__module__", "")).partition(".")[0] == package


def order_stages(names: Sequence[str], changes: Mapping[str, StageParams], order: Sequence[str] | None) -> list[str]:
    """Return the names of a pipeline's stages in order.

    Args:
        names: the stages of the pipeline as it comes.
        changes: what the user inserts, moves and removes.
        order: the user's own list; None: `names` with the changes.

    Raises:
        ValueError: a name is unknown; one line with the known ones.
    """
    known = list(dict.fromkeys((*names, *(name for name, change in changes.items() if change.use is not None))))
    for name, change in changes.items():
        if name not in known:
            raise ValueError(_unknown(f"stages.{name}: stage", name, known, "To insert it, give `use`."))
        if not (name in names or change.before or change.after or order is not None):
            raise ValueError(f"stages.{name} needs a place: before or after one of {', '.join(names)}.")
        for key, other in (("before", change.before), ("after", change.after)):
            if other is not None and (other not in known or other == name):
                raise ValueError(_unknown(f"stages.{name}.{key}", other, [each for each in known if each != name]))
    listed = _with_changes(names, changes)
    if order is None:
        return listed
    moves = [name for name, change in changes.items() if change.before or change.after or change.remove]
    if moves and listed != list(order):
        raise ValueError(
            f"stage_order and stages.{moves[0]} disagree: the changes of stages give [{', '.join(listed)}]. "
            "Leave stage_order out (null), or before, after and remove."
        )
    return _given_order(order, known, [name for name, change in changes.items() if change.use is not None])


def _with_changes(names: Sequence[str], changes: Mapping[str, StageParams]) -> list[str]:
    listed = [name for name in names if not (name in changes and changes[name].remove)]
    for name, change in changes.items():
        target = change.before or change.after
        if target is not None:
            listed = [each for each in listed if each != name]
            if target not in listed:
                raise ValueError(_unknown(f"stages.{name}: stage", target, listed, "Insert it first."))
            listed.insert(listed.index(target) + (change.before is None), name)
    return listed


def _given_order(order: Sequence[str], known: Sequence[str], used: Sequence[str]) -> list[str]:
    for name in order:
        if name not in known:
            raise ValueError(_unknown("stage_order", name, known))
        if list(order).count(name) > 1:
            raise ValueError(f"stage_order names '{name}' twice.")
    for name in used:
        if name not in order:
            raise ValueError(f"stages.{name} has no place in stage_order: {', '.join(order)}.")
    return list(order)


def _unknown(what: str, name: str, known: Sequence[str], fix: str = "") -> str:
    return f"{unknown_name_message(what, name, list(known), listed_as='Stages')} {fix}".strip()
