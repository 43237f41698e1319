"""Create a model without memory: what its code does to weights is recorded, and played back tensor by tensor.

Tensors that code would allocate are on the meta device meanwhile. Playing the recording back does what the code did, in
its order, so that random numbers are those of a model that was made at once; but a tensor is given away and freed as
soon as it is final, and rows of stored tensors are read from their files without the others.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATEN = torch.ops.aten
# what allocates memory whose values do not depend on a tensor's
_ALLOCATIONS = {
    *(_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.zeros.default, _ATEN.ones.default),
    *(_ATEN.full.default, _ATEN.empty_like.default, _ATEN.zeros_like.default, _ATEN.ones_like.default),
    *(_ATEN.full_like.default, _ATEN.new_empty.default, _ATEN.new_zeros.default, _ATEN.new_ones.default),
    *(_ATEN.new_full.default, _ATEN.new_empty_strided.default),
}
_EMPTY = {
    *(_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.empty_like.default, _ATEN.new_empty.default),
    _ATEN.new_empty_strided.default,
}
# what gives every element of its first argument a value that does not depend on the one before
_OVERWRITING = {
    *(_ATEN.copy_.default, _ATEN.fill_.Scalar, _ATEN.zero_.default, _ATEN.normal_.default, _ATEN.uniform_.default),
    nn.init._no_grad_trunc_normal_,
}
# smaller tensors that are not random are computed at once, because code may look at them
_NUM_LARGE_BYTES = 1 << 14
# lets transformers convert weights in this thread, which is recorded
_ONE_THREAD = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}


@dataclass(frozen=True)
class _View:
    """A tensor on the meta device: how it lies in its storage."""

    key: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def is_whole(self, num_bytes: int) -> bool:
        """Return True if it is all of its storage, in order."""
        dense = torch.empty(self.shape, device="meta").stride()
        return prod(self.shape) * self.dtype.itemsize == num_bytes and self.stride == dense and not self.offset

    def of(self, values: Tensor) -> Tensor:
        """Return this view of a storage that holds real values."""
        storage = values.untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Operation:
    function: Any
    args: Any
    kwargs: dict[str, Any]
    # of tensors that it returns in new storages
    made: list[_View]
    reads: frozenset[int]
    writes: frozenset[int]
    # of `writes`, what it overwrites whole
    replaces: frozenset[int]
    is_random: bool
    # code asked for this tensor on the CPU, not on the meta device, where nothing is drawn
    is_on_cpu: bool


@dataclass(frozen=True)
class _Stored:
    """Tensors of files, one below the other, in another type perhaps."""

    pieces: list[Tensor]
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Return the shape of all rows; empty if they do not fit together."""
        first = self.pieces[0].shape
        if len(self.pieces) == 1 or any(piece.shape[1:] != first[1:] for piece in self.pieces):
            return first if len(self.pieces) == 1 else torch.Size()
        return torch.Size((sum(len(piece) for piece in self.pieces), *first[1:]))

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows; slice(None) is all of them, and all that a scalar has."""
        if rows == slice(None):
            found = self.pieces
        else:
            start, stop, _ = rows.indices(sum(len(piece) for piece in self.pieces))
            found, first = [], 0
            for piece in self.pieces:
                found.append(piece[max(start - first, 0) : max(stop - first, 0)])
                first += len(piece)
            found = [piece for piece in found if len(piece)] or found[:1]
        return (found[0] if len(found) == 1 else torch.cat(found)).to(self.dtype)


_IS_META: Any = Tensor.is_meta
# what code raises where it looks at values that there are none of
NO_VALUES = (NotImplementedError, RuntimeError, TypeError, BufferError)


class _FullInit(TorchFunctionMode):
    """Lets nn.init do all that it does: newer versions leave tensors on the meta device as they are."""

    # no function, which type checkers would wrap: the frame above must be the caller's
    __torch_function__ = lambda self, func, types, args=(), kwargs=None: (  # noqa: E731
        False
        if func == _IS_META.__get__ and sys._getframe(1).f_globals is vars(nn.init)
        else func(*args, **(kwargs or {}))
    )


class Recording(TorchDispatchMode):
    """Records what happens to tensors in its context, in place of allocating them.

    Raises:
        NO_VALUES: in its context, where code looks at values that there are none of yet, or sets the random state; at
            its end, if that code has caught the error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[_Operation] = []
        # keeps them, so that no other gets the same key
        self._storages: dict[int, Any] = {}
        # those that code asked for on the CPU, though they are on the meta device
        self._on_cpu: set[int] = set()
        # those that something was written to
        self._set: set[int] = set()
        self._random_state = torch.get_rng_state()
        self._stack = ExitStack()
        # why it cannot be played back
        self._fault = ""

    def __enter__(self) -> "Recording":
        """Start recording, or go on."""
        self._stack.enter_context(patch.dict(os.environ, _ONE_THREAD))
        # draws until all numbers are within bounds, and so nothing on the meta device
        draw = partial(self._draw_truncated, nn.init._no_grad_trunc_normal_)
        self._stack.enter_context(patch.object(nn.init, "_no_grad_trunc_normal_", draw))
        for name in ("manual_seed", "set_rng_state"):
            self._stack.enter_context(patch.object(torch, name, partial(self._refuse, f"torch.{name} is called")))
        self._stack.enter_context(_FullInit())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        super().__exit__(*error)
        self._stack.close()
        if self._fault and error[0] is None:
            self._refuse(self._fault)

    def _refuse(self, fault: str, *_: Any) -> NoReturn:
        self._fault = fault
        raise NotImplementedError(fault)

    def _draw_truncated(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not tensor.is_meta:
            return function(tensor, *args, **kwargs)
        self._record(function, (tensor, *args), kwargs, [], [tensor], is_random=True)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the meta device, and record it; or run it for real, if it only concerns small values."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        returned = func._schema.returns
        is_writing = func._schema.is_mutable
        is_view = not is_writing and any(each.alias_info is not None for each in returned)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        device = kwargs.get("device")
        is_recorded = is_random or func in _ALLOCATIONS or torch.device(device or "cpu").type == "meta"
        is_recorded = is_recorded or any(t.is_meta or t.nbytes >= _NUM_LARGE_BYTES for t in given)
        # a tensor of a file is an empty one at first
        if is_view or not is_recorded or (func in _EMPTY and args[0] == [0]):
            return func(*args, **kwargs)
        written: list[Any] = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if is_writing and not (written and all(isinstance(each, Tensor) and each.is_meta for each in written)):
            self._refuse(f"{func} changes what is not recorded")
        is_on_cpu = (given[0].device if device is None and given else torch.device(device or "cpu")).type != "meta"
        is_on_cpu = is_on_cpu or (device is None and any(self._key(tensor) in self._on_cpu for tensor in given))
        try:
            result = func(*tree_map(_to_meta, args), **_on_meta(func, tree_map(_to_meta, kwargs), is_made=not given))
        except NO_VALUES as error:
            self._fault = str(error).partition("\n")[0]
            raise
        keys = {self._key(tensor) for tensor in given if tensor.is_meta}
        made = [self._view(t) for t in tree_leaves(result) if isinstance(t, Tensor) and self._key(t) not in keys]
        self._on_cpu |= {view.key for view in made} if is_on_cpu else set()
        if func in _EMPTY:
            return result
        self._record(func, args, kwargs, made, written, is_random=is_random)
        return result

    def _record(
        self, function: Any, args: Any, kwargs: Any, made: list[_View], written: list[Tensor], *, is_random: bool
    ) -> None:
        writes = frozenset(map(self._key, written))
        is_replaced = function in _OVERWRITING and self._is_whole(self._view(written[0]))
        read = tree_leaves((args[1:] if is_replaced else args, kwargs))
        reads = frozenset(self._key(leaf) for leaf in read if isinstance(leaf, Tensor) and leaf.is_meta)
        if (reads - writes) & self._on_cpu - self._set:
            self._refuse(f"{function} reads a tensor that has no values")
        self._set |= writes | {view.key for view in made}
        self._operations.append(
            _Operation(
                function,
                *tree_map(self._keep, (tuple(args), dict(kwargs))),
                made=made,
                reads=reads,
                writes=writes,
                replaces=writes if is_replaced else frozenset(),
                is_random=is_random,
                is_on_cpu=bool(self._on_cpu & (writes | {view.key for view in made})),
            )
        )

    def find_unset(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the names of tensors that nothing was written to."""
        return [name for name, tensor in tensors.items() if tensor.is_meta and self._key(tensor) not in self._set]

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if tensor.is_meta:
            self._storages[storage._cdata] = storage
        return storage._cdata

    def _view(self, tensor: Tensor) -> _View:
        return _View(self._key(tensor), tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _keep(self, value: Any) -> Any:
        """Return an argument as it is recorded: large tensors are of files, which nothing changes."""
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            return self._view(value)
        return value.detach() if value.nbytes >= _NUM_LARGE_BYTES else value.detach().clone()

    def _is_whole(self, view: _View) -> bool:
        return view.is_whole(self._storages[view.key].nbytes())

    @torch.no_grad()
    def play(
        self, tensors: Mapping[str, Tensor], rows: Mapping[str, slice] | None = None, *, draws: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Make tensors by playing the recording back, and yield each one as soon as it is final.

        Those that nothing was written to are left out. The random generator is left as the model's code would leave it.

        Args:
            tensors: by name.
            rows: which of their rows to yield, by name; all by default.
            draws: false: draw no random numbers but those that these tensors depend on.
        """
        torch.set_rng_state(self._random_state)
        wanted: dict[int, list[tuple[str, _View, slice]]] = {}
        for name, tensor in tensors.items():
            part = slice(None) if rows is None else rows[name]
            if tensor.is_meta:
                wanted.setdefault(self._key(tensor), []).append((name, self._view(tensor), part))
            else:
                yield name, _Stored([tensor], tensor.dtype).read(part)
        steps = self._find_needed(set(wanted), draws)
        last_use = {
            key: number
            for number, (step, is_used) in enumerate(steps)
            if is_used
            for key in (*step.reads, *step.writes, *(view.key for view in step.made))
        }
        values: dict[int, Tensor | _Stored] = {}
        for number, (step, is_used) in enumerate(steps):
            made = self._run(step, values)
            if not is_used:
                continue
            values |= made
            for key in (*step.reads, *step.writes, *(view.key for view in step.made)):
                if last_use[key] == number and key in values:
                    value = values.pop(key)
                    for name, view, part in wanted.get(key, ()):
                        yield name, self._read(value, view, part)

    def _find_needed(self, keys: set[int], draws: bool) -> list[tuple[_Operation, bool]]:
        """Return the operations that run, and which of them for their results."""
        steps = []
        ever = set(keys)
        for operation in reversed(self._operations):
            changed = operation.writes | {view.key for view in operation.made}
            is_used = bool(changed & keys)
            if is_used:
                keys = (keys - changed.difference(operation.writes - operation.replaces)) | operation.reads
                ever |= keys
            # what is overwritten later was drawn all the same; what asks for the device of such a tensor is on the CPU
            is_drawn = draws and operation.is_random and (operation.is_on_cpu or bool(changed & ever))
            if is_used or is_drawn:
                steps.append((operation, is_used))
        return steps[::-1]

    def _run(self, step: _Operation, values: Mapping[int, Tensor | _Stored]) -> dict[int, Tensor | _Stored]:
        """Run an operation; return what is in the storages that it made or changed."""
        stored = self._find_stored(step, values)
        if stored is not None:
            return dict([stored])
        held: dict[int, Tensor] = {}

        def load(value: Any) -> Any:
            if not isinstance(value, _View):
                return value
            if value.key not in held:
                found = values.get(value.key)
                if found is None or (value.key in step.replaces):
                    found = torch.empty(self._storages[value.key].nbytes(), dtype=torch.uint8)
                elif isinstance(found, _Stored):
                    # what a file holds stays as it is
                    found = found.read().clone(memory_format=torch.contiguous_format)
                held[value.key] = found
            return value.of(held[value.key])

        args, kwargs = tree_map(load, (step.args, step.kwargs))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        result = [leaf for leaf in tree_leaves(step.function(*args, **kwargs)) if isinstance(leaf, Tensor)]
        changed: dict[int, Tensor | _Stored] = {key: held[key] for key in step.writes}
        for view, tensor in zip(step.made, result if step.made else (), strict=True):
            if tensor.stride() != view.stride or tensor.untyped_storage().nbytes() != self._storages[view.key].nbytes():
                tensor = torch.empty_strided(view.shape, view.stride, dtype=view.dtype).copy_(tensor)
            changed[view.key] = tensor
        return changed

    def _find_stored(self, step: _Operation, values: Mapping[int, Tensor | _Stored]) -> tuple[int, _Stored] | None:
        """Return the storage that an operation fills with copies of what files hold, and these; None if it does not."""
        args = step.args
        if step.function is _ATEN.copy_.default and step.replaces:
            target, sources = args[0], [args[1]]
        elif step.function in (_ATEN._to_copy.default, _ATEN.clone.default):
            target, sources = step.made[0], [args[0]]
        elif step.function is _ATEN.cat.default and args[1:] in ((), (0,)) and not step.kwargs:
            target, sources = step.made[0], args[0]
        else:
            return None
        pieces: list[Tensor] = []
        for source in sources:
            found = _Stored([source], source.dtype) if isinstance(source, Tensor) else values.get(source.key)
            is_all = isinstance(source, Tensor) or self._is_whole(source)
            if not isinstance(found, _Stored) or not is_all:
                return None
            # a narrower type in between has rounded
            if any(torch.promote_types(piece.dtype, found.dtype) != found.dtype for piece in found.pieces):
                return None
            pieces += found.pieces
        stored = _Stored(pieces, target.dtype)
        is_same = len({piece.dtype for piece in pieces}) == 1 and stored.shape == target.shape
        return (target.key, stored) if is_same and self._is_whole(target) else None

    def _read(self, value: Tensor | _Stored, view: _View, rows: slice) -> Tensor:
        if isinstance(value, _Stored):
            if value.shape == view.shape and self._is_whole(view):
                return value.read(rows)
            value = value.read().clone(memory_format=torch.contiguous_format)
        tensor = view.of(value)
        return tensor if rows == slice(None) else tensor[rows]


def _to_meta(value: Any) -> Any:
    # a scalar may be on any device
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta and value.ndim else value


def _on_meta(func: Any, kwargs: dict[str, Any], *, is_made: bool) -> dict[str, Any]:
    takes_device = any(argument.name == "device" for argument in func._schema.arguments)
    if takes_device and (is_made or kwargs.get("device") is not None):
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        return {**kwargs, "device": torch.device("meta")}
    return kwargs
