"""Name the stages of a pipeline, change the list by name, and run stages of users and of WebDataset in it.

A stage of a user is a function `sample -> sample`. None or an empty list drops the sample, which is not counted as
broken; a list or a generator makes several of it, at most as many as declared (`samples`). Each is a training sample of
its own: a row of the dataset counts `samples` times, and the part of a row that does not exist is replaced like a
sample that is dropped. So the order stays a function of the position. A function may have a parameter `generator`,
which is keyed by the seed and the position; the global generators are keyed likewise while it runs.
"""

import functools
import inspect
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NoReturn, TypeAlias, overload

import numpy as np
import torch

from vla_foundry.data.reader import Dropped
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.stages import StageParams, order_stages, webdataset_stage
from vla_foundry.randomness import create_key, hash_int
from vla_foundry.registry import unknown_name_message

Sample: TypeAlias = dict[str, Any]
Stage: TypeAlias = "Callable[[Sample], Any] | BatchStage"


# keys of a sample that a user's stage need not return, and cannot change
_KEPT = ("__key__", "__url__", "__seed__", "__position__", "__is_training__", "__length__", "__piece__")


class Unselected(Dropped):
    """Raised for a sample that a user's stage does not want: it is replaced, but it is not broken."""


class BatchStage(ABC):
    """A stage that takes many samples at once, for when that is faster than one by one."""

    @abstractmethod
    def apply(self, samples: Sequence[Sample]) -> "list[Sample | ValueError]":
        """Return one result per sample: the sample, or the error that drops it (`Dropped`) or marks it as broken.

        Raises:
            ValueError: some sample is broken; the stage is applied to halves until the broken ones are found.
        """


def name_of_stage(stage: Any) -> str:
    """Return a stage's name for messages."""
    return getattr(stage, "stage_name", None) or getattr(stage, "__name__", None) or type(stage).__name__


def create_generator(sample: Sample, purpose: str) -> np.random.Generator:
    """Return a generator of random numbers for a sample: the same in every run, process and order of reading."""
    key = [create_key(sample["__seed__"], f"stage {purpose}"), sample["__position__"]]
    return np.random.Generator(np.random.Philox(key=np.asarray(key, dtype=np.uint64)))


@contextmanager
def _keyed_globals(sample: Sample, purpose: str) -> Iterator[None]:
    """Seed the global generators by the sample, and give them back as they were."""
    word = hash_int(create_key(sample["__seed__"], f"global {purpose}"), sample["__position__"])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(word)
    np.random.seed(word & 0xFFFFFFFF)
    torch.default_generator.manual_seed(word >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _WithGenerator:
    """A function that has a parameter `generator`, as a function of the sample alone."""

    def __init__(self, function: Callable[..., Any], purpose: str) -> None:
        self.function, self.purpose = function, purpose

    def __call__(self, sample: Sample) -> Any:
        return self.function(sample, generator=create_generator(sample, self.purpose))


def _give_generator(value: Any, purpose: str) -> Any:
    """Return a function of the sample that gets its generator, if it asks for one; anything else unchanged."""
    return _WithGenerator(value, purpose) if callable(value) and _asks(value) else value


def _asks(function: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return False


class UserStage(ABC):
    """A stage that is not ours, by its name.

    Args:
        name: its name, for messages and as the key of its random draws.
        samples: most samples that it makes of one.
    """

    def __init__(self, name: str, samples: int) -> None:
        self.stage_name = name
        self.samples = samples

    @abstractmethod
    def run(self, sample: Sample) -> Any:
        """Return a sample, several of them, or None."""

    def __call__(self, sample: Sample) -> Sample:
        """Run the stage.

        Raises:
            Unselected: it makes no sample of this one.
            Dropped: it makes more samples than declared.
        """
        keys = {key: sample[key] for key in _KEPT if key in sample}
        with _keyed_globals(sample, self.stage_name):
            made = self.run(sample)
            if made is None or isinstance(made, Mapping):
                made = [] if made is None else [made]
            elif isinstance(made, str | bytes) or not isinstance(made, Iterable):
                raise TypeError(
                    f"it returned {type(made).__name__}, not a sample (a dictionary), a list or generator of samples, "
                    f"or None{'. wds.select takes a condition' * isinstance(made, bool)}"
                )
            made = list(made)
        if len(made) > self.samples:
            raise Dropped(
                f"{self.stage_name}: too many samples",
                f"it makes {len(made)} of one, but `samples` of the stage is {self.samples}",
            )
        rest, number = divmod(sample.get("__part__", 0), self.samples)
        if number >= len(made):
            raise Unselected(f"{self.stage_name}: dropped", f"it returned {len(made) or 'no'} samples")
        if not isinstance(made[number], Mapping):
            raise TypeError(f"it returned {type(made[number]).__name__}, not a sample, which is a dictionary")
        return {**made[number], **keys, "__part__": rest}


class FunctionStage(UserStage):
    """A function of a user: `sample -> sample`, several, or None."""

    def __init__(self, name: str, function: Callable[..., Any], *, samples: int = 1) -> None:
        super().__init__(name, samples)
        self._function = _give_generator(function, name)

    def run(self, sample: Sample) -> Any:
        """See UserStage."""
        return self._function(sample)


class WebDatasetStage(UserStage):
    """A stage of WebDataset, which maps one iterable of samples to another: `WebDatasetStage(wds.decode())`.

    Raises:
        ValueError: it does not fit into an exact pipeline; the message says why.
    """

    def __init__(self, stage: Any, *, name: str = "", samples: int = 1) -> None:
        secure_webdataset()
        if is_webdataset(stage):
            kind = getattr(getattr(stage, "f", None), "__name__", type(stage).__name__).lstrip("_")
            webdataset_stage(f"wds.{kind}")
            name = name or f"wds.{kind}"
            args = [_give_generator(value, name) for value in stage.args]  # pyright: ignore[reportFunctionMemberAccess]
            stage = type(stage)(stage.f, *args, **stage.kw)  # pyright: ignore
        super().__init__(name or name_of_stage(stage), samples)
        self._stage = stage

    def __setstate__(self, state: dict[str, Any]) -> None:
        secure_webdataset()
        vars(self).update(state)

    def run(self, sample: Sample) -> Any:
        """See UserStage.

        Raises:
            ValueError: a member cannot be decoded.
        """
        from webdataset.autodecode import DecodingError

        try:
            return list(self._stage([sample]))
        except DecodingError as error:  # which says nothing itself
            raise ValueError(f"its member {getattr(error, 'k', '')}: {error.__cause__}") from error


def is_webdataset(stage: Any) -> bool:
    """Return whether an object is a stage made by webdataset."""
    return any(base.__module__.startswith("webdataset.") for base in type(stage).__mro__)


def secure_webdataset() -> None:
    """Switch webdataset's secure mode on, and let nothing unpickle, also if it is imported already."""
    os.environ["WDS_SECURE"] = "1"
    from webdataset import autodecode, filters, utils

    utils.enforce_security = True  # pyright: ignore[reportAttributeAccessIssue]
    autodecode.decoders.update(dict.fromkeys(("pkl", "pickle", "pyd", "pth"), _refuse_pickle))
    for module, name in ((autodecode, "unpickle_loads"), (autodecode, "torch_loads"), (filters, "decode_pickle")):
        setattr(module, name, _refuse_pickle)
    filters.default_decoders[:] = [
        (pattern, _refuse_pickle if pattern == "*.pyd" else decoder) for pattern, decoder in filters.default_decoders
    ]


def _refuse_pickle(content: Any) -> NoReturn:
    raise ValueError("it is a pickle, which is never loaded: it could run any code. wds.decode(only=...) leaves it out")


class Stages(Sequence[Any]):
    """The stages of a pipeline in order, each with a name. The methods return another list.

    Args:
        stages: the stages, by name or with their own names.
    """

    def __init__(self, stages: "Mapping[str, Any] | Iterable[Any]" = ()) -> None:
        named = stages.items() if isinstance(stages, Mapping) else ((name_of_stage(each), each) for each in stages)
        self._stages: dict[str, Any] = {}
        for name, stage in named:
            copies = (f"{name}_{number}" if number > 1 else name for number in count(1))
            unique = next(each for each in copies if each not in self._stages)
            self._stages[unique] = _wrap(unique, stage, 1)

    @property
    def names(self) -> list[str]:
        """The stages' names in order."""
        return list(self._stages)

    def describe(self) -> list[str]:
        """Return the stages' names, and how many samples those that are not ours make of one."""
        return [
            f"{name} ({stage.samples})" if isinstance(stage, UserStage) else name
            for name, stage in self._stages.items()
        ]

    @property
    def samples_per_row(self) -> int:
        """Most samples that the stages make of one row."""
        return math.prod(stage.samples for stage in self if isinstance(stage, UserStage))

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stages.values())

    @overload
    def __getitem__(self, index: int | str) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | str | slice) -> Any:
        """Return a stage by its place or its name.

        Raises:
            ValueError: there is no stage of this name.
        """
        if isinstance(index, str):
            self._check(index)
            return self._stages[index]
        return list(self._stages.values())[index]

    def insert(
        self,
        name: str,
        stage: Any,
        *,
        before: str | None = None,
        after: str | None = None,
        samples: int = 1,
    ) -> "Stages":
        """Return the list with one more stage, before or after another one.

        Raises:
            ValueError: the other stage is unknown, or this one is there already or does not fit in.
        """
        if name in self._stages:
            raise ValueError(f"stage '{name}' is there already. Use replace, or another name.")
        return self._changed(
            {name: _wrap(name, stage, samples)}, {name: StageParams(use=name, before=before, after=after)}
        )

    def replace(self, name: str, stage: Any, *, samples: int = 1) -> "Stages":
        """Return the list with another stage under this name."""
        self._check(name)
        return self._changed({name: _wrap(name, stage, samples)}, {})

    def remove(self, name: str) -> "Stages":
        """Return the list without a stage."""
        return self._changed({}, {name: StageParams(remove=True)})

    def move(self, name: str, *, before: str | None = None, after: str | None = None) -> "Stages":
        """Return the list with a stage at another place."""
        return self._changed({}, {name: StageParams(before=before, after=after)})

    def with_params(self, params: DataParams) -> "Stages":
        """Return the list with the changes of `data.stages`, in the order of `data.stage_order`.

        Raises:
            ValueError: a name or a function is unknown.
        """
        try:
            created = {name: _create(name, each) for name, each in params.stages.items() if each.use is not None}
            return self._changed(created, params.stages, params.stage_order)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None

    def _changed(
        self, created: Mapping[str, Any], changes: Mapping[str, StageParams], order: Sequence[str] | None = None
    ) -> "Stages":
        stages = {**self._stages, **created}
        return Stages({name: stages[name] for name in order_stages(self.names, changes, order)})

    def _check(self, name: str) -> None:
        if name not in self._stages:
            raise ValueError(unknown_name_message("stage", name, self.names, listed_as="Stages"))


def _wrap(name: str, stage: Any, samples: int) -> Any:
    """Return one of our stages unchanged, and a user's with its name."""
    function = stage if inspect.isroutine(stage) or inspect.isclass(stage) else type(stage)
    if isinstance(stage, UserStage | BatchStage) or str(function.__module__).startswith("vla_foundry."):
        return stage
    if is_webdataset(stage):
        return WebDatasetStage(stage, name=name, samples=samples)
    return FunctionStage(name, stage, samples=samples)


def _create(name: str, params: StageParams) -> UserStage:
    """Create the stage that the params describe.

    Raises:
        ValueError: a function is unknown, or the arguments do not fit it.
    """
    assert params.use is not None, "a stage of the user's"
    try:
        function, args, kwargs = params.load()
        if function is None:
            secure_webdataset()
            import webdataset

            stage = getattr(webdataset, str(webdataset_stage(params.use)))(*args, **kwargs)
            inspect.signature(stage.f).bind(None, *args, **kwargs)
        elif inspect.isclass(function):
            stage = function(*args, **kwargs)
        elif args:
            raise ValueError(f"{params.use} is a function of the sample: it takes kwargs, but no args.")
        else:
            stage = functools.partial(function, **kwargs) if kwargs else function
            inspect.signature(stage).bind(None, **({"generator": None} if _asks(stage) else {}))
        return _wrap(name, stage, params.samples)
    except (TypeError, ValueError) as error:
        raise ValueError(f"stages.{name}: {error}") from None
