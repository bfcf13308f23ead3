"""Tensors as safetensors files: equal tensors, equal bytes; nothing that could run code is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cascade.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: tuple[str, str] | None = None) -> bytes:
    """The safetensors file of `tensors`; equal tensors give equal bytes.

    At most one pair of metadata: safetensors writes several in random order.
    """
    from safetensors.torch import save

    seen: set[int] = set()
    ready = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if pointer in seen else tensor  # shared storage is refused by safetensors
        seen.add(pointer)
    return save(ready, metadata=dict([metadata]) if metadata else None)


def bytes_to_tensors(data: bytes, where: str = "tensors") -> dict[str, Tensor]:
    """The tensors of a safetensors file, sorted by name. Raises InputError; pickle and zip are refused by content."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    refuse_pickle(data, where)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: is not a safetensors file: {error}", fix="name a safetensors file") from error
    return {name: tensors[name] for name in sorted(tensors)}


def metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that `bytes_to_tensors` has accepted."""
    size = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return {str(key): str(value) for key, value in found.items()}


def refuse_pickle(data: bytes, where: str) -> None:
    """Raises InputError if `data` begins as a zip (torch.save), a pickle or a tar: those formats can run code.

    A safetensors file begins with the length of its header, which may read as a pickle's first bytes (384, 640, ...).
    """
    if data[4:9] == bytes(4) + b"{":
        return
    zipped = data[:4] in (b"PK\x03\x04", b"PK\x05\x06")
    pickled = data[:1] == b"\x80" and data[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")
    if zipped or pickled or data[257:262] == b"ustar":
        raise InputError(
            f"{where}: is a pickle or an archive, which can run code when it is loaded; only safetensors are read",
            fix="convert it where it was made: safetensors.torch.save_file(state_dict, 'model.safetensors')",
        )
