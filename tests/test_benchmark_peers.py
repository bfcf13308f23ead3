"""The comparison with the peers: what it counts, what it concludes, and a run in miniature with none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from cascade.config import parse
from cascade.nets.unet import VideoUNet
from cascade.nets.unet_config import UNetConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peer_child  # noqa: E402
import peer_models  # noqa: E402
import peer_tables  # noqa: E402
import peers  # noqa: E402

SETTINGS: dict[str, Any] = yaml.safe_load((BENCHMARKS / "peers.yaml").read_text())
MINIATURE: dict[str, Any] = {
    "text": {"tokens": 3, "width": 8},
    "shapes": {"16x32x32": [2, 8, 8]},
    "ours": "cascade",
    "seconds": 0.02,
    "networks": {"cascade": {"10M": {"levels": [{"channels": 16, "text_attention": True}], "embedding": 8}}},
    "chains": {},
    "equal": {},
}


# counting ------------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_closed_form() -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16)

    def call(x: torch.Tensor) -> torch.Tensor:
        tokens = linear(conv(x).flatten(2).transpose(1, 2))  # (2, 30, 16)
        q = tokens.unflatten(2, (2, 8)).transpose(1, 2)  # (2, 2, 30, 8)
        return F.scaled_dot_product_attention(q, q[:, :, :7], q[:, :, :7])

    with torch.inference_mode():
        out, flops = peer_child.counted(call, torch.randn(2, 3, 5, 6))
    positions = 2 * 5 * 6
    assert out.shape == (2, 2, 30, 8)
    want = [2 * positions * 3 * 8 * 9, 2 * positions * 8 * 16, 2 * (2 * 2 * 30 * 7 * 8) * 2]
    assert sorted(flops.values()) == sorted(want)


def test_a_bias_in_attention_is_counted_as_none() -> None:
    q = torch.randn(1, 2, 6, 8)
    with torch.inference_mode():
        plain = peer_child.counted(lambda x: F.scaled_dot_product_attention(x, x, x), q)[1]
        biased = peer_child.counted(lambda x: F.scaled_dot_product_attention(x, x, x, torch.zeros(1, 2, 6, 6)), q)[1]
    assert sum(plain.values()) == sum(biased.values()) == 2 * 2 * 6 * 6 * (8 + 8)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::slow_conv3d_forward", "convolution"),
        ("convolution", "convolution"),
        ("aten::addmm", "linear"),
        ("aten::bmm", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_group_norm", "norm"),
        ("aten::var_mean", "norm"),
        ("aten::copy_", "copies"),
        ("aten::silu", "elementwise and the rest"),
    ],
)
def test_every_operator_has_its_kind(operator: str, kind: str) -> None:
    assert peer_child.kind(operator) == kind


# numbers -------------------------------------------------------------------------------------------------------------


def test_no_layer_stays_at_zero_and_others_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.zeros_(net[1].weight)
    before = net[0].weight.clone()
    peer_models.fill(net)
    assert all(parameter.any() for parameter in net.parameters())
    assert torch.equal(net[0].weight, before)


def test_numbers_by_name_depend_on_nothing_else() -> None:
    one, other = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.LayerNorm(4)}), nn.ModuleDict({"b": nn.LayerNorm(4)})
    other["a"] = nn.Linear(3, 4)
    peer_models.by_name(one)
    torch.manual_seed(5)
    peer_models.by_name(other)
    same = {name: torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()}
    assert same == dict.fromkeys(("a.weight", "a.bias", "b.weight", "b.bias"), True)
    assert (one["b"].weight - 1).abs().max() < 0.6 < one["b"].weight.mean()


# what is compared ----------------------------------------------------------------------------------------------------


def widths(tree: Any) -> Iterator[int]:
    """Every width that the settings name."""
    if isinstance(tree, dict):
        if "dim" in tree:
            yield from (tree["dim"] * times for times in tree.get("dim_mults", tree.get("dim_mult")))
        yield from tree.get("block_out_channels", [])
        if "attention_head_dim" in tree and "num_attention_heads" in tree:
            yield tree["attention_head_dim"] * tree["num_attention_heads"]
        if "channels" in tree and "levels" not in tree:
            yield tree["channels"]
        for part in tree.values():
            yield from widths(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from widths(part)


def test_widths_are_aligned_for_everyone() -> None:
    found = list(widths({name: SETTINGS[name] for name in ("networks", "chains", "equal")}))
    assert len(found) > 50
    assert not [width for width in found if width % 16]


@pytest.mark.parametrize("size", ["10M", "50M"])
def test_ours_has_every_attention_and_the_size_it_says(size: str) -> None:
    cfg = parse({**SETTINGS["networks"]["cascade"][size], "text": SETTINGS["text"]["width"]}, UNetConfig)
    with torch.device("meta"):
        params = sum(p.numel() for p in VideoUNet(cfg).parameters())
    assert params == pytest.approx(1e6 * int(size.removesuffix("M")), rel=0.1)
    deep = cfg.levels[1:]
    assert all(level.spatial_attention and level.text_attention and "attn" in level.mixer.value for level in deep)
    assert all(level.channels % 64 == 0 for level in cfg.levels)


def test_both_stages_of_our_cascade_are_the_network_that_is_compared() -> None:
    chain = SETTINGS["chains"]["cascade-chain"]["10M"]
    assert chain["net"] == SETTINGS["networks"]["cascade"]["10M"]
    theirs = SETTINGS["chains"]["imagen-pytorch-chain"]["10M"]
    assert theirs["net"] == SETTINGS["networks"]["imagen-pytorch"]["10M"]
    assert theirs["steps"] == chain["sampler"]["steps"]


def test_every_network_can_be_built_by_someone() -> None:
    names = [name for part in ("networks", "chains", "equal") for name in SETTINGS[part]]
    assert {name.removesuffix(peer_tables.WIDE) for name in names} == set(peer_models.NETWORKS)
    assert next(iter(SETTINGS["networks"])) == SETTINGS["ours"]


def test_our_cascade_makes_a_clip_by_all_of_its_steps() -> None:
    settings = SETTINGS["chains"]["cascade-chain"]["10M"] | {"net": MINIATURE["networks"]["cascade"]["10M"]}
    work = peer_models.Work(2, 8, 8, 3, 8)
    nets, call = peer_models.build("cascade-chain", settings, work)
    calls = [0, 0]
    for i, net in enumerate(nets.children()):
        net.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    assert call(work.clip()).shape == (1, 3, 2, 8, 8)
    assert calls == [8, 8]


@pytest.mark.slow
def test_two_codes_of_one_architecture_agree() -> None:
    work = peer_models.Work(2, 8, 8, 3, 8)
    ours, theirs = (SETTINGS["equal"][name]["10M"] for name in ("cascade-unet3d", "diffusers-unet3d"))
    out = [
        peer_models.build(name, settings, work, named=True)[1](work.clip())
        for name, settings in (("cascade-unet3d", ours), ("diffusers-unet3d", theirs))
    ]
    assert (out[0] - out[1]).abs().max() < 1e-4 * out[0].abs().max()


# conclusions ---------------------------------------------------------------------------------------------------------


def row(name: str, flops: int, *seconds: float) -> peer_tables.Row:
    answers = [{"cpu": s, "wall": 2 * s, "gemm_cpu": 100.0, "gemm_wall": 50.0, "bytes": 7} for s in seconds]
    return peer_tables.Row(name, params=1, flops=flops, bytes=5, rounds={"forward": answers}, output=[1.0, -2.0])


def test_a_ratio_is_speed_per_flop_in_the_same_round() -> None:
    rows = [row("ours", 60, 1, 2, 1), row("theirs", 30, 1, 8, 2), row("theirs wide", 60, 2, 2, 2)]
    assert peer_tables.ratios(rows, "forward", "cpu") == {"theirs": [2, 8, 4], "theirs wide": [2, 1, 2]}
    assert peer_tables.summary(rows, "forward", "cpu") == {"gemm_fraction": 0.6, "ratios": {"theirs": 4}}
    assert peer_tables.summary(rows, "forward", "wall")["gemm_fraction"] == 0.6


def test_the_table_shows_the_spread_and_who_failed() -> None:
    failed = peer_tables.Row("failed", refused="No module named 'x'")
    lines = peer_tables.table(
        [row("ours", 60, 1, 2, 1), row("theirs", 30, 1, 8, 2), failed], "forward", "cpu"
    ).splitlines()
    assert "4.00 (2.00 to 8.00) | 2.00 |" in lines[3]
    assert "No module named 'x'" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_outputs_that_differ_are_seen() -> None:
    one, other = row("a", 1, 1), row("b", 1, 1)
    assert peer_tables.apart([one, other]) == 0
    other.output = [1.0, -1.5]
    assert peer_tables.apart([one, other]) == 0.25


def test_everyone_is_first_once_in_as_many_rounds() -> None:
    rows = [row(name, 1, 1) for name in "abcde"]
    turns = [[each.name for each in peers.turned(rows, number)] for number in range(5)]
    assert sorted(turn[0] for turn in turns) == list("abcde")
    assert all(sorted(turn) == list("abcde") for turn in turns)


# a run ---------------------------------------------------------------------------------------------------------------


def run(folder: Path, settings: dict[str, Any]) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--quick", "--rounds", "2", "--json", "out.json"]
    done = subprocess.run(
        [*command, "--settings", "settings.yaml"], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, json.loads((folder / "out.json").read_text())


def test_a_run_measures_ours_and_says_who_is_missing(tmp_path: Path) -> None:
    networks = {**MINIATURE["networks"], "nobody": {"10M": {}}}
    done, found = run(tmp_path, MINIATURE | {"networks": networks})
    assert set(found) == {"gemm_fraction", "ratios"}
    assert found["ratios"] == {}
    assert 0 < found["gemm_fraction"] < 1.5
    assert "KeyError: 'nobody'" in done.stdout
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 network")


def test_ours_beside_itself_is_as_fast_and_trains(tmp_path: Path) -> None:
    settings = MINIATURE | {"networks": {**MINIATURE["networks"], "cascade wide": MINIATURE["networks"]["cascade"]}}
    part = peers.Part("10M", "16x32x32", tasks=("forward", "train"))
    rows = peers.measure(part, settings, list(settings["networks"]), rounds=1, limit=100)
    ours, again = rows
    assert not ours.refused
    assert ours.output == again.output
    assert (ours.params, ours.flops) == (again.params, again.flops)
    assert 0 < ours.bytes < ours.rounds["train"][0]["bytes"]
    assert 0.1 < peer_tables.ratios(rows, "forward", "cpu")["cascade wide"][0] < 10
