"""A function of tensors run again with a few of them exchanged: what does not depend on those is not computed anew.

Every operation of torch that the first run makes is kept with its arguments and its result. In a later run, an
operation whose arguments are the very same objects gets the result that is there; what an exchanged weight has touched
is another object, and so is all that follows from it. So nothing needs to be known of the function's structure: a
decoder block of any architecture computes no more than what lies behind the module that was exchanged.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allocator.blocks.products import has_faster_changes, linear, linear_of_change

__all__ = ["Replay", "ReplayError"]


class ReplayError(Exception):
    """What is to be computed anew needs a tensor as it was before it was changed in place."""


class Replay(TorchFunctionMode):
    """A context: within the first one operations are kept, within later ones those that are the same are not run.

    ends: by name, weights of linear operations that need not be run again: in later runs those get the result of the
    first one, and `at_ends` has the input of the latest run where it is another than `inputs_of_ends`, of the first.
    Those named in `passed` are run like any other, and `went_past` names those of them that were in the latest run.
    Within later runs ReplayError is raised where they need a tensor that the first one has changed since (in place).
    """

    def __init__(self, ends: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.passed: Collection[str] = ()
        self.went_past: set[str] = set()
        self.at_ends: dict[str, Tensor] = {}
        self.inputs_of_ends: dict[str, Tensor] = {}
        self._results_of_ends: dict[str, Tensor] = {}
        self._ends = {id(weight): name for name, weight in ends.items()}
        self._exchanged: tuple[int, Tensor | None] = (0, None)
        # Of weights of linear operations: input and result; None for one that was multiplied with more than once.
        self._products: dict[int, tuple[Tensor, Tensor, Any] | None] = {}
        self._kept: dict[Hashable, Any] = {}
        # By id, and kept alive so that no other object can have that id.
        self._known: dict[int, Tensor] = {}
        # How often each storage was changed in place: in the first run, and in the present one until now.
        self._changes: Counter[int] = Counter()
        self._changes_now: Counter[int] = Counter()
        self._first = True

    def __enter__(self) -> "Replay":
        self.at_ends, self.went_past = {}, set()
        self._changes_now.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._first:
            self._first, self._changes = False, self._changes_now.copy()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    @property
    def nbytes(self) -> int:
        """Memory that the tensors of the first run take, those that it was given included."""
        storages = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in self._known.values()}
        return sum(storages.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        key = (func, _key(args, tensors), _key(kwargs, tensors), self._states(tensors))
        if self._first:
            self._know(tensors)
            result = _run(func, args, kwargs)
            self._keep(key, func, args, result)
        elif (known := all(id(tensor) in self._known for tensor in tensors)) and key in self._kept:
            result = self._kept[key]
        elif not known and (end := self._end(func, args)) is not None and end not in self.passed:
            self.at_ends[end] = args[0]
            return self._results_of_ends[end]
        else:
            if not known and end is not None:
                self.went_past.add(end)
            self._require_unchanged(func, args, kwargs, tensors)
            result = self._changed_product(args) if func is F.linear and not kwargs else None
            return _run(func, args, kwargs) if result is None else result
        if _changes_in_place(func, kwargs):
            self._changes_now[_storage(tensors[0])] += 1
        return result

    def exchange(self, source: Tensor, weight: Tensor) -> None:
        """Say that the next run has `weight` where the first one had `source`."""
        self._exchanged = (id(weight), source)

    def _changed_product(self, args: tuple[Any, ...]) -> Tensor | None:
        """The result of a linear operation from that of the first run, where one of inputs and weight is another and
        the product of the change alone is faster."""
        inputs, weight = args[:2]
        if not has_faster_changes(inputs, weight):
            return None
        exchanged, source = self._exchanged
        known = self._products.get(id(source if id(weight) == exchanged else weight))
        if known is None or (len(args) > 2 and args[2] is not known[2]):
            return None
        base, result, _ = known
        if id(weight) != exchanged:
            change = linear_of_change(inputs - base, weight) if inputs.shape == base.shape else None
        else:
            change = linear_of_change(inputs, weight - source) if inputs is base else None
        return None if change is None else result + change

    def _states(self, tensors: list[Tensor]) -> Hashable:
        """How often each of `tensors` was changed until now, which it seldom is."""
        if not self._changes_now:
            return ()
        counts = [self._changes_now[_storage(tensor)] for tensor in tensors]
        return tuple((place, count) for place, count in enumerate(counts) if count)

    def _require_unchanged(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        known = [_storage(tensor) for tensor in tensors if id(tensor) in self._known]
        if any(self._changes[storage] != self._changes_now[storage] for storage in known):
            raise ReplayError("a tensor has been changed in place since")
        if _changes_in_place(func, kwargs) and _storage(tensors[0]) in known:
            raise ReplayError("a tensor of the first run would be changed in place")

    def _know(self, tensors: list[Tensor]) -> None:
        self._known |= {id(tensor): tensor for tensor in tensors}

    def _end(self, func: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
        return self._ends.get(id(args[1])) if func is F.linear else None

    def _keep(self, key: Hashable, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        if result is None:  # it changes something else, such as whether gradients are kept
            return
        self._kept[key] = result
        found: list[Tensor] = []
        _key(result, found)
        self._know(found)
        if func is F.linear:
            again = id(args[1]) in self._products
            self._products[id(args[1])] = None if again else (args[0], result, args[2] if len(args) > 2 else None)
        if (end := self._end(func, args)) is not None:
            self.inputs_of_ends[end], self._results_of_ends[end] = args[0], result


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return linear(*args, **kwargs) if func is F.linear else func(*args, **kwargs)


def _changes_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether the first of the tensors that `func` is given is another afterwards."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or "out" in kwargs or (name[:1] != "_" and name[-1:] == "_")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _key(value: Any, tensors: list[Tensor]) -> Hashable:
    """What tells arguments apart: tensors, which are added to `tensors`, by who they are, all else by value."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (Tensor, id(value))
    if isinstance(value, tuple | list):
        return (type(value), *(_key(part, tensors) for part in value))
    if isinstance(value, dict):
        return (dict, *((name, _key(part, tensors)) for name, part in value.items()))
    if isinstance(value, slice):
        return (slice, *(_key(part, tensors) for part in (value.start, value.stop, value.step)))
    return (type(value), value if isinstance(value, Hashable) else id(value))
