"""Every shipped configuration of the Triton kernels compiles for Hopper (sm_90) and fits it. Needs Triton, no GPU."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SHARED = 227 * 1024  # bytes of a block on sm_90
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Bytes of registers that may be spilled (frames, head size, backward) with Triton 3.6 and 3.7; elsewhere 16 at most.
SPILLS = {
    torch.bfloat16: {(64, 128, True): 96, (128, 64, True): 512, (128, 128, True): 1200, (128, 128, False): 32},
    torch.float32: {(64, 64, True): 600, (64, 128, True): 1900, (64, 128, False): 1100, (64, 64, False): 200},
}


def resources(
    into: Path, function: Any, types: dict[str, str], constants: dict[str, object], **options: int
) -> tuple[int, int]:
    """(stack bytes, shared bytes) of a kernel compiled for sm_90; pointers and strides are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, hints = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if signature[name].startswith("*") or re.fullmatch("[gqkv][bfsh]", name):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=hints)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(inspect.getfile(triton)).parent / "backends/nvidia/bin/cuobjdump"
    (into / "cubin").write_bytes(built.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", into / "cubin"], capture_output=True, text=True, check=False).stdout
    print(report)
    found = re.search(r"STACK:(\d+)", report)
    assert found, report
    return int(found[1]), built.metadata.shared


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head", [64, 96, 128])
@pytest.mark.parametrize("frames", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
)
def test_temporal_attention_fits(
    dtype: torch.dtype, precision: str, frames: int, head: int, backward: bool, prepared: bool, tmp_path: Path
) -> None:
    from triton import next_power_of_2

    from cascade.kernels import temporal, temporal_triton

    if dtype is torch.float32 and frames > temporal.FRAMES_FLOAT32 // (1 + prepared):
        pytest.skip("refused")
    launch = temporal_triton.configuration(frames, head, dtype, backward)
    lanes = next_power_of_2(head)
    constants: dict[str, object] = {
        "F": frames,
        "FP": frames,
        "D": head,
        "LANES": lanes,
        "R": launch.rows,
        "BIASED": True,
    }
    constants |= {
        "NORMED": prepared,
        "TURNED": prepared,
        "PRECISION": precision,
        "WIDE": False,
        "BIAS_GRADIENT" if backward else "NEEDS_LSE": backward,
    }
    types = dict.fromkeys(("Q", "K", "V", "G", "OUT", "DQ", "DK", "DV"), f"*{NAMES[dtype]}")
    types |= dict.fromkeys(("BIAS", "LSE", "DBIAS", "GAINS", "TURN", "DGAINS"), "*fp32") | {"scale": "fp32"}
    function = temporal_triton._backward if backward else temporal_triton._forward
    stack, shared = resources(tmp_path, function, types, constants, num_warps=launch.warps, num_stages=launch.stages)
    assert shared <= SHARED
    if prepared:  # no stage norms or turns q and k yet: it is to compile and to fit
        assert stack <= 5000
    else:
        assert stack <= SPILLS[dtype].get((frames, lanes, backward), 16)


# N, C, H, W of paper-size stages and of the shipped ones; the last fills a row alone
IMAGES = [(2048, 64, 16, 16), (2048, 192, 8, 8), (700, 96, 4, 4), (62, 64, 64, 64), (16, 128, 192, 320)]
IMAGES += [(32, 144, 96, 160), (128, 80, 384, 640), (32, 320, 48, 80), (16, 1664, 12, 20), (16, 4096, 24, 40)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group_norm_fits(dtype: torch.dtype, shape: tuple[int, ...], backward: bool, tmp_path: Path) -> None:
    """What is spilled stands outside the loops over an image."""
    from cascade.kernels import norm_plan, norm_triton

    images, channels, height, width = shape
    tuning = norm_plan.BACKWARD if backward else norm_plan.FORWARD
    how = norm_plan.plan(images, channels, height * width, 8, tuning, 132)
    assert how.whole == (height * width * channels <= 16384)
    types = dict.fromkeys(("X", "Y", "GRAD", "DX"), f"*{NAMES[dtype]}") | {"eps": "fp32", "DONE": "*i32"}
    single = ("W", "B", "FILM", "MEAN", "RSTD", "PARTS", "LANEWISE", "MOMENTS", "DAFFINE", "DFILM")
    types |= dict.fromkeys(single, "*fp32")
    constants: dict[str, object] = {**how.constants, "FILMED": True, "SILU": True, "FAST": True}
    for work in ("whole",) if how.whole else ("sums", "apply"):
        function = getattr(norm_triton, f"{'backward' if backward else 'forward'}_{work}")
        stack, shared = resources(tmp_path, function, types, constants, **how.options)
        assert shared <= SHARED and stack <= (400 if channels > 2048 else 64)


def test_parameter_gradients_fit(tmp_path: Path) -> None:
    from cascade.kernels import norm_triton

    types = dict.fromkeys(("W", "B", "FILM", "LANEWISE", "DAFFINE", "DFILM"), "*fp32")
    constants: dict[str, object] = {"C": 320, "FOLD": 3, "LANES": 64, "ROWS": 32, "FILMED": True}
    stack, shared = resources(tmp_path, norm_triton.parameter_gradients, types, constants, num_warps=4)
    assert shared <= SHARED and stack == 0
