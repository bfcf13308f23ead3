"""What the kernels' launchers answer, beside the numbers: memory, shapes, types. Without Triton: nothing is launched.

torch.library looks at every call of an operator and raises where answers share memory; a kernel for another device says
nothing about that.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from cascade.kernels import norm, norm_plan, temporal


class Launched:
    """In place of a kernel."""

    def __init__(self, function: Any) -> None:
        self.calls = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(n > 0 for n in grid)
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.calls += 1


def jit(function: Any = None, **_: Any) -> Any:
    return Launched if function is None else Launched(function)


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Loads modules of `cascade.kernels`, each after those it imports, with nothing behind `triton`: the last."""
    language = MagicMock(constexpr=lambda x: x)
    stand_in = MagicMock(jit=jit, language=language, cdiv=norm_plan.ceil, next_power_of_2=norm_plan.power)
    for name, module in (("triton", stand_in), ("triton.language", language), ("queries_triton", MagicMock())):
        monkeypatch.setitem(sys.modules, f"cascade.kernels.{name}" if "queries" in name else name, module)

    def load(*names: str) -> ModuleType:
        for name in names:
            path = Path(norm.__file__).with_name(f"{name}.py")
            spec = importlib.util.spec_from_file_location(f"cascade.kernels.{name}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
        return module

    yield load


def keeps_the_rules(inputs: tuple[Any, ...], answers: tuple[Tensor, ...], promised: tuple[Tensor, ...]) -> None:
    """No answer shares memory with an input or another answer; each looks as the operator promises to the compiler."""
    storages = [x.untyped_storage()._cdata for x in answers]
    given = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
    assert len(set(storages)) == len(storages) and not given & set(storages)
    for mine, want in zip(answers, promised, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_group_norm(whole: bool, images: int, film: bool, launchers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = launchers("norm_forward_triton", "norm_backward_triton", "norm_triton")
    tuning = norm_plan.Tuning(each=4, chunk=400, whole=2**20 * whole, registers=80)
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(norm_plan, name, tuning)
    x, grad = torch.randn(2, images, 16, 5, 3).bfloat16()
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias, told = torch.ones(16), torch.zeros(16), torch.randn(images, 32) if film else None
    args = (x, weight, bias, told, 8, 1e-5, True, torch.float32)
    got = kernels.forward(*args)
    keeps_the_rules(args, got, norm._forward_shapes(*args))
    back = (grad, x, weight, bias, told, *got[1:], 8, True)
    keeps_the_rules(back, kernels.backward(*back), norm._backward_shapes(*back))
    works = [f"{way}_{work}" for way in ("forward", "backward") for work in ("whole", "sums", "apply")]
    assert [getattr(kernels, name).calls for name in works] == [whole, not whole, not whole] * 2
    assert kernels.parameter_gradients.calls == (not whole)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_temporal_attention(batch: int, biased: bool, prepared: bool, launchers: Any) -> None:
    kernels = launchers("temporal_triton")
    q, k, v = torch.randn(batch, 8, 5, 3, 2, 16).bfloat16().unbind(3)
    bias = torch.randn(batch, 2, 8, 8) if biased else None
    extra = (torch.ones(2, 16), temporal.angles(8, 16)) if prepared else (None, None)
    for lse in (False, True):
        args = (q, k, v, bias, 0.25, lse)
        got = kernels.forward(*args, "ieee", None, *extra)
        keeps_the_rules((*args, *extra), got, temporal._forward_shapes(*args, *extra))
    back = (torch.randn_like(q), q, k, v, bias, 0.25, biased)
    got = kernels.backward(*back, "ieee", None, *extra)
    keeps_the_rules((*back, *extra), got, temporal._backward_shapes(*back, *extra))
    assert (kernels._forward.calls, kernels._backward.calls) == (2, 1)
