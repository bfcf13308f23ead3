"""Tensors out of pickles that others published, without unpickling: nothing that a file names is looked up or called.

A pickle is a program for a stack machine. Here its instructions are read by the standard library's disassembler and
only those that build plain data are carried out; what would call something leaves a `Call` that says what and with
what. Arrays of NumPy and tensors of PyTorch are then made from the calls that stand for them, and from no others.
For conversion alone (cascade/assets.py, cascade/importers): weights in use are safetensors.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.errors import InputError

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
NOTHING = {"PROTO", "FRAME", "STOP"}
RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}  # NumPy 1, 2
NUMPY = {"f4": torch.float32, "f8": torch.float64, "f2": torch.float16, "i4": torch.int32, "i8": torch.int64}
TORCH = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A function or class that the pickle names."""

    full: str


@dataclass
class Call:
    """What the pickle wants called, or made by a class and then given `state`."""

    what: Any
    args: Any
    state: Any = None


class Ordered(dict[Any, Any]):
    """An OrderedDict, as a module's state dict is one, with what hangs on it."""

    state: Any = None


class Mark:
    """Where on the stack a run of items begins."""


def read(data: bytes, where: str) -> Any:
    """The pickle as dicts, lists, tuples, numbers, texts, bytes, `Name` and `Call`. Raises InputError."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for op, arg, _ in pickletools.genops(data):
            _step(op.name, arg, stack, memo)
        return stack[-1]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(where, f"is not a pickle of plain data: {error}") from error


def _step(op: str, arg: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction; those that old or unusual pickles alone have raise ValueError."""
    if op in VALUES:
        stack.append(arg)
    elif op in CONSTANTS:
        stack.append(CONSTANTS[op])
    elif op in EMPTY:
        stack.append(EMPTY[op]())
    elif op == "MARK":
        stack.append(Mark())
    elif op == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif op in ("BINPUT", "LONG_BINPUT"):
        memo[arg] = stack[-1]
    elif op in ("BINGET", "LONG_BINGET"):
        stack.append(memo[arg])
    elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(_taken(stack, int(op[-1]))))
    elif op == "TUPLE":
        stack.append(tuple(_marked(stack)))
    elif op in ("SETITEM", "SETITEMS"):
        items = _taken(stack, 2) if op == "SETITEM" else _marked(stack)
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif op in ("APPEND", "APPENDS"):
        items = _taken(stack, 1) if op == "APPEND" else _marked(stack)
        stack[-1].extend(items)
    elif op == "GLOBAL":
        stack.append(Name(arg.replace(" ", ".")))
    elif op == "STACK_GLOBAL":
        stack.append(Name(".".join(_taken(stack, 2))))
    elif op in ("REDUCE", "NEWOBJ"):
        call = Call(*_taken(stack, 2))
        stack.append(Ordered() if call == Call(Name("collections.OrderedDict"), ()) else call)
    elif op == "BINPERSID":
        stack.append(Call(Name("persistent"), stack.pop()))
    elif op == "BUILD":
        state = stack.pop()
        stack[-1].state = state
    elif op not in NOTHING:
        raise ValueError(f"{op} is not an instruction for plain data")


def _taken(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    del stack[-count:]
    return items


def _marked(stack: list[Any]) -> list[Any]:
    start = max(i for i, item in enumerate(stack) if isinstance(item, Mark))
    items = stack[start + 1 :]
    del stack[start:]
    return items


def numpy_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The arrays of a pickled tree of dicts, named by their path with dots. Raises InputError."""
    return dict(_leaves(read(data, where), "", lambda call: _array(call, where), where))


def torch_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a zip that torch.save or torch.jit.save wrote, named by their path; no code in it is run.

    Numbers, texts and the like beside the tensors are passed over. Raises InputError.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        pickle = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickle.removesuffix("data.pkl") + "data/"
        tree = read(archive.read(pickle), where)
        return dict(_leaves(tree, "", lambda call: _stored(call, archive, folder, where), where, strict=False))
    except (zipfile.BadZipFile, StopIteration, KeyError) as error:
        raise _unfit(where, f"is not a file of torch.save: {error}") from error


def _leaves(
    tree: Any, path: str, tensor: Callable[[Call], Tensor | None], where: str, strict: bool = True
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Call):
        found = tensor(tree)
        if found is not None:
            yield path, found
            return
        tree = tree.state  # an object: its attributes
    if isinstance(tree, dict):
        for name, part in tree.items():
            yield from _leaves(part, f"{path}.{name}" if path else str(name), tensor, where, strict)
    elif strict:
        raise _unfit(where, f"{path or 'it'} is a {type(tree).__name__}, expected arrays in dicts")


def _array(call: Call, where: str) -> Tensor:
    """ndarray.__reduce__ of protocols 3 and 4: an empty array, then (version, shape, dtype, Fortran order, bytes)."""
    try:
        if call.what.full not in RECONSTRUCT:
            raise ValueError(call.what.full)
        _, shape, dtype, fortran, data = call.state
        kind, order = dtype.args[0], dtype.state[1]
        if fortran or order != "<" or dtype.what != Name("numpy.dtype"):
            raise ValueError(f"type {order}{kind}, Fortran order {fortran}")
        return _from_bytes(data, NUMPY[kind]).view(shape)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unfit(where, f"holds what is no plain array: {error}") from error


def _stored(call: Call, archive: zipfile.ZipFile, folder: str, where: str) -> Tensor | None:
    """torch._utils._rebuild_tensor_v2: a stretch of a storage, which is a file of its own in the zip."""
    if call.what == Name("torch._utils._rebuild_parameter") and isinstance(call.args[0], Call):
        call = call.args[0]
    if call.what != Name("torch._utils._rebuild_tensor_v2"):
        return None
    try:
        storage, offset, shape, stride = call.args[:4]
        _, kind, key, *_ = storage.args
        whole = _from_bytes(archive.read(folder + key), TORCH[kind.full.removeprefix("torch.")])
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and not 0 <= offset <= last < len(whole):  # as_strided would read outside
            raise ValueError(f"elements {offset} to {last} of {len(whole)}")
        return whole.as_strided(shape, stride, offset).clone(memory_format=torch.contiguous_format)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unfit(where, f"holds what is no plain tensor: {error}") from error


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)  # a bytearray: torch wants memory that may be written


def _unfit(where: str, reason: str) -> InputError:
    return InputError(f"{where}: {reason}", fix="take the file from the package it is said to be in")
