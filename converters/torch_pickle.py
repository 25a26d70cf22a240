"""What a file of `torch.save` says of its tensors, read from its pickle without unpickling it.

A pickle is a program for a small stack machine. This one knows the instructions that a state dict needs (`OPCODES`),
and the names that it needs (`torch_tensors.NAMES`); nothing is imported, and anything else is refused by name.

    GLOBAL 'torch._utils _rebuild_tensor_v2'   BINPERSID ('storage', FloatStorage, '0', 'cpu', 12)   REDUCE ...
    -> {"lora_A.weight": PickledTensor("F32", Storage("0", "F32", 12), offset=0, shape=(4, 3), strides=(3, 1))}

Memory and time grow with the pickle's size alone: values are shared, never copied, compared or walked through.
Format: Lib/pickletools.py, https://github.com/python/cpython.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from converters.errors import listed
from converters.torch_tensors import (
    CALLS,
    FOREIGN,
    NAMES,
    BrokenPickleError,
    ForbiddenError,
    Global,
    PickledTensor,
    storage_of,
)

T = TypeVar("T")
MAX_INSTRUCTIONS = 2_000_000  # a tensor takes about 40
MAX_SHOWN = 80


def read_pickle(data: bytes) -> dict[str, PickledTensor]:
    """The tensors of a state dict, by name.

    Raises:
        BrokenPickleError: it is no pickle, or contradicts itself.
        ForbiddenError: it holds other things than a state dict does.
    """
    found = _run(data)
    if type(found) is not dict:
        raise ForbiddenError(f"holds {_kind(found)}, and no dictionary of tensors")
    wrong = [
        f"{name!s:.{MAX_SHOWN}}: is {_kind(value)}"
        for name, value in found.items()
        if type(name) is not str or type(value) is not PickledTensor
    ]
    if wrong:
        raise ForbiddenError(f"holds other things than tensors with names:{listed(wrong)}")
    return found


def _kind(value: object) -> str:
    return f"a {'tensor' if type(value) is PickledTensor else type(value).__name__}"


def _run(data: bytes) -> object:
    machine, place = _Machine(), 0
    try:
        for count, (instruction, argument, position) in enumerate(pickletools.genops(data)):
            place = position or 0
            if count == MAX_INSTRUCTIONS:
                raise ForbiddenError(f"has more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name not in OPCODES:
                raise ForbiddenError(f"uses the pickle's instruction {instruction.name}")
            OPCODES[instruction.name](machine, argument)
    except (ValueError, LookupError) as error:  # of pickletools, or an empty stack
        raise BrokenPickleError(f"is broken at byte {place} of its pickle ({error!s:.{MAX_SHOWN}})") from None
    if len(machine.stack) != 1 or machine.marked or place + 1 != len(data):
        raise BrokenPickleError("is broken: its pickle does not end where it should")
    return machine.stack[0]


class _Machine:
    """Its values are text, numbers, tuples, lists, dictionaries and the records of `torch_tensors`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        below = self.marked.pop()
        items, self.stack = self.stack, below
        return items

    def last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise LookupError("too few values")
        del self.stack[-count:]
        return items

    def add_items(self, items: list[Any]) -> None:
        _of_type(self.stack[-1], list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = _of_type(self.stack[-1], dict)
        for name, value in zip(items[0::2], items[1::2], strict=True):
            if type(name) not in (str, int):
                raise LookupError("a key that is neither text nor a number")
            if name in target:
                raise LookupError(f"more than one entry {name!s:.{MAX_SHOWN}}")
            target[name] = value

    def set_memo(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def name(self, name: str) -> None:
        if name in FOREIGN:
            raise ForbiddenError(f"holds {FOREIGN[name]}")
        if name not in NAMES:
            raise ForbiddenError(f"would import {name:.{MAX_SHOWN}}, which weights do not need")
        self.push(Global(name))

    def name_on_stack(self) -> None:
        module, name = self.last(2)
        self.name(f"{_of_type(module, str)}.{_of_type(name, str)}")

    def call(self) -> None:
        function, arguments = self.last(2)
        name = _of_type(function, Global).name
        if name not in CALLS:
            raise ForbiddenError(f"calls {name}")
        self.push(CALLS[name](_of_type(arguments, tuple)))

    def set_state(self) -> None:
        """Attributes of an object: a state dict has `_metadata`, versions of modules, which its tensors do not need."""
        target, state = self.last(2)
        if type(target) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
            raise ForbiddenError("sets attributes of objects")
        self.push(target)


def _of_type(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise LookupError(f"{_kind(value)} where a {kind.__name__} belongs")
    return value


def _value(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _text(machine: _Machine, argument: str) -> None:
    argument.encode("utf-8")  # half a character, which no message could show, is a ValueError
    machine.push(argument)


def _nothing(machine: _Machine, argument: Any) -> None:
    pass


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(tuple(machine.last(count)))


# Instruction to what it does with its argument.
OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "STOP": _nothing,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "BININT": _value,
    "BININT1": _value,
    "BININT2": _value,
    "LONG1": _value,
    "BINFLOAT": _value,
    "BINUNICODE": _text,
    "SHORT_BINUNICODE": _text,
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda machine, _: machine.add_items(machine.last(1)),
    "APPENDS": lambda machine, _: machine.add_items(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPUT": _Machine.set_memo,
    "LONG_BINPUT": _Machine.set_memo,
    "MEMOIZE": lambda machine, _: machine.set_memo(len(machine.memo)),
    "BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "GLOBAL": lambda machine, name: machine.name(name.replace(" ", ".")),
    "STACK_GLOBAL": lambda machine, _: machine.name_on_stack(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.set_state(),
    "BINPERSID": lambda machine, _: machine.push(storage_of(_of_type(machine.last(1)[0], tuple))),
}
