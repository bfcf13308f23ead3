"""Our T5 is transformers', to the last bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from cascade.config import package_root
from cascade.noise import generator
from cascade.t5 import T5Config, T5Encoder
from cascade.text import T5Text, TextConfig

SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CASES = [
    {"feed_forward_proj": "gated-gelu"},  # v1.1
    {"feed_forward_proj": "relu", "relative_attention_max_distance": 20},
    {"feed_forward_proj": "gated-gelu", "d_kv": 16, "relative_attention_num_buckets": 8, "layer_norm_epsilon": 1e-3},
]


def both(changes: dict[str, Any]) -> tuple[T5Encoder, Any]:
    """Ours and transformers' with the same random weights, loaded by their names."""
    from transformers import T5Config as Theirs
    from transformers import T5EncoderModel

    theirs = T5EncoderModel(Theirs(**(SIZES | changes))).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator("t5", name)))
    ours = T5Encoder(T5Config.read({**SIZES, **changes, "n_positions": 512})).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_transformers_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype, one_thread: None) -> None:
    ours, theirs = (model.to(dtype) for model in both(changes))
    for length in (1, 9, 150):
        ids = torch.randint(64, (3, length), generator=generator("ids", length))
        assert torch.equal(ours(ids), theirs(input_ids=ids).last_hidden_state)
        mask = torch.arange(length) < torch.tensor([[length], [1], [length // 2 + 1]])
        expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert torch.equal(ours(ids, mask)[mask], expected[mask])


def test_the_shipped_encoder_needs_no_transformers() -> None:
    program = (
        "import sys; from cascade.text import T5Text, TextConfig; T5Text(TextConfig()).encode(['a red circle']);"
        "sys.exit('transformers' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=package_root())
    assert T5Text(TextConfig()).width == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_ff": None}, "d_ff is None, expected a whole number"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"d_model": True}, "d_model is True"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu', expected relu or gated-gelu"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small', expected a number"),
    ],
)
def test_settings_that_are_not_t5s_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        T5Config.read({**SIZES, **changes})


def test_settings_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="'d_kv' and 'd_ff'"):
        T5Config.read({name: value for name, value in SIZES.items() if name not in ("d_kv", "d_ff")})
