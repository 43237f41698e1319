"""What every config dataclass is made from: strict frozen dataclasses, and choices by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import draccus

from vla_foundry.config.derivation import Derived, Facts

P = TypeVar("P", bound=type)


@dataclass(frozen=True, kw_only=True)
class BaseParams:
    """Base of every config dataclass.

    `__post_init__` checks a class's own fields; its messages begin with a field's name, and the front adds the path.
    """

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Return the fields of this section that follow from others: {field: value and where it comes from}.

        Args:
            root: the whole config (TrainExperimentParams); sections before this one are derived already.
            facts: what is known about the machine and the data.
        """
        return {}

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check this section against the others, once everything is derived.

        Args:
            root: the whole config (TrainExperimentParams).
            facts: what is known about the machine and the data.
            path: config path of this section, for messages; "" for the root.

        Returns:
            notices: what is no error, but worth saying.

        Raises:
            ValueError: what does not fit together, in one line with config paths and a fix.
        """
        return []


@dataclass(frozen=True, kw_only=True)
class ChoiceParams(BaseParams, draccus.ChoiceRegistry):
    """Base of params whose concrete class is chosen by the key `type`. Each role sets its own `_choice_registry`."""

    # the config path of the choice, as the user types it
    choice_path: ClassVar[str] = "type"
    # name of the type that a slot of this role has when nothing else tells; None: it must be told
    native_type: ClassVar[str | None] = None

    @classmethod
    def default_choice_name(cls) -> str | None:
        """The native type of this role."""
        return cls.native_type

    @classmethod
    def registered_name(cls) -> str:
        """The name this class is registered as."""
        return cls.get_choice_name(cls)

    @property
    def type(self) -> str:
        """The name this class is registered as."""
        return self.registered_name()


def _register(cls: P, name: str) -> P:
    for role in cls.__mro__:
        registry: dict[str, Any] | None = role.__dict__.get("_choice_registry")
        # draccus gives ChoiceParams a registry too, in which a model and a data type of one name would collide
        if registry is not None and role is not ChoiceParams:
            if registry.get(name, cls) is not cls:
                raise ValueError(f"{role.choice_path} '{name}' is registered twice. Choose another name.")
            registry[name] = cls
    return cls


def register_model_params(name: str) -> Callable[[P], P]:
    """Register a dataclass as the params of the model called `name`, in every role it has."""
    return lambda cls: _register(cls, name)


def register_data_params(name: str) -> Callable[[P], P]:
    """Register a dataclass as the params of the data type called `name`."""
    return lambda cls: _register(cls, name)


def register_converter_params(name: str) -> Callable[[P], P]:
    """Register a dataclass as the params of the converter of robot recordings called `name`."""
    return lambda cls: _register(cls, name)
