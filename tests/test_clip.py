"""Laws of the CLIP prompt encoder, with small random ones made here as transformers saves them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.compose import compose
from cascade.config import parse
from cascade.errors import ConfigError, InputError, NumericError
from cascade.planning.plan import stored
from cascade.text import EmbeddingStore, PriorText, T5Text, TextConfig, encoder_of, known_width, text_source
from cascade.text.clip import CLIPText

PIECES = ["!", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
START, END = 8, 9
PROMPTS = ["ab a c", "C  aB", "a b c a b c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text_encoder/ and tokenizer/ side by side, as diffusers has them; ! pads, as in OpenCLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel

    root = tmp_path_factory.mktemp("clip")
    write_tokenizer(root / "tokenizer", "!")
    sizes = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=12, bos_token_id=START, eos_token_id=END)
    )
    weights = {f"text_model.{name}": tensor * 3 for name, tensor in model.state_dict().items()}  # as older files say
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    (root / "text_encoder").mkdir()
    save_file(weights, root / "text_encoder" / "model.safetensors", {"format": "pt"})
    (root / "text_encoder" / "config.json").write_text(json.dumps(model.config.to_dict()))
    return root / "text_encoder"


def write_tokenizer(folder: Path, pad: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(PIECES)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))


def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((folder / "config.json").read_text())
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    state = load_file(folder / "model.safetensors")
    state.pop("text_model.embeddings.position_ids")
    model.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in state.items()})
    with torch.no_grad():
        tokens: torch.Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return tokens


def config(folder: Path, **changes: object) -> TextConfig:
    return parse({"encoder": str(folder), "max_tokens": 12, "pad": True, "mask": False} | changes, TextConfig)


def test_all_positions_count_padding_too_and_are_what_transformers_gives(folder: Path) -> None:
    encoder = encoder_of(config(folder))
    assert isinstance(encoder, CLIPText) and encoder.width == known_width(config(folder)) == 16
    text = encoder.encode(PROMPTS)
    assert bool(text.mask.all()) and text.tokens.shape == (3, 12, 16)
    assert torch.equal(text.tokens[0], reference(folder, [START, 7, 4, 6, END] + [0] * 7))
    assert torch.equal(text.tokens[1], reference(folder, [START, 6, 7, END] + [0] * 8))


def test_the_empty_prompt_is_text_of_its_own(folder: Path) -> None:
    text = CLIPText(config(folder)).encode([""])
    assert bool(text.mask.all()) and torch.equal(text.tokens[0], reference(folder, [START, END] + [0] * 10))


def test_which_token_pads_is_the_tokenizers_to_say(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "text_encoder"))
    write_tokenizer(other, "<|endoftext|>")  # in the folder itself
    mine, theirs = CLIPText(config(other)), CLIPText(config(folder))
    assert torch.equal(mine.encode(["a"]).tokens[0], reference(folder, [START, 4] + [END] * 10))
    assert mine.fingerprint != theirs.fingerprint


def test_without_padding_real_tokens_are_the_same_and_the_rest_is_masked(folder: Path) -> None:
    """CLIP is causal: what comes after a token does not reach it."""
    full, short = CLIPText(config(folder)).encode(PROMPTS), CLIPText(config(folder, pad=False)).encode(PROMPTS)
    assert short.mask.sum(1).tolist() == [5, 4, 8]
    torch.testing.assert_close(short.tokens[short.mask], full.tokens[short.mask], atol=1e-5, rtol=0)


def test_a_prompt_does_not_depend_on_its_batch_and_survives_a_store(folder: Path, tmp_path: Path) -> None:
    encoder = CLIPText(config(folder))
    together = encoder.encode(PROMPTS)
    store = EmbeddingStore.create(tmp_path / "store", encoder)
    assert store.put([*PROMPTS, ""], encoder) == 4
    read = text_source(config(folder, store=str(tmp_path / "store")))
    for i, prompt in enumerate(PROMPTS):
        for source in (encoder, read):
            assert torch.equal(source.encode([prompt]).tokens[0], together.tokens[i])
    assert torch.equal(read.encode([""]).tokens, encoder.encode([""]).tokens)


def test_what_is_cut_off_is_said_and_the_end_mark_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = CLIPText(config(folder, max_tokens=4))
    with caplog.at_level(logging.WARNING, "cascade"):
        assert encoder.ids("a b c a") == [START, 4, 5, END]
    assert "longer than 4 tokens, this is ignored: c a" in caplog.text


def test_every_setting_that_changes_embeddings_is_in_the_fingerprint(folder: Path) -> None:
    changes: list[dict[str, object]] = [{}, {"pad": False}, {"mask": True}, {"lower": True}, {"precision": "bfloat16"}]
    assert len({CLIPText(config(folder, **change)).fingerprint for change in changes}) == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda at: (at.parent / "tokenizer" / "merges.txt").unlink(), r"merges\.txt missing.*a CLIP folder"),
        (lambda at: (at / "config.json").write_text('{"model_type": "clip", "hidden_size": 8}'), "do not fit"),
        (lambda at: save_file({"a": torch.ones(1)}, at / "model.safetensors"), "missing"),
        (lambda at: (at.parent / "tokenizer" / "vocab.json").write_text("{"), "vocab.json"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, change: object, reason: str) -> None:
    root = Path(shutil.copytree(folder.parent, tmp_path / "clip"))
    change(root / "text_encoder")  # type: ignore[operator]
    with pytest.raises(InputError, match=reason):
        encoder_of(config(root / "text_encoder"))


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(folder.parent, tmp_path / "clip")) / "text_encoder"
    weights = load_file(root / "model.safetensors")
    weights["text_model.final_layer_norm.bias"][3] = float("nan")
    save_file(weights, root / "model.safetensors")
    with pytest.raises(NumericError, match=r"final_layer_norm\.bias"):
        CLIPText(config(root))


def test_more_tokens_than_positions_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"knows 12 positions.*Fix: text\.max_tokens=12"):
        CLIPText(config(folder, max_tokens=13))


# T5 as IF and Show-1 read it -----------------------------------------------------------------------------------------


def test_t5_padded_and_masked_as_transformers_does_it_in_a_batch() -> None:
    plain, padded = T5Text(TextConfig(max_tokens=9)), T5Text(TextConfig(max_tokens=9, pad=True, lower=True))
    text = padded.encode(["  A Red circle ", ""])
    ids = plain.ids("a red circle")
    rows = torch.tensor([ids + [0] * (9 - len(ids)), [plain.tokenizer.eos_id()] + [0] * 8])
    mask = torch.tensor([[1] * len(ids) + [0] * (9 - len(ids)), [1] + [0] * 8])
    with torch.no_grad():
        expected = plain.model(input_ids=rows, attention_mask=mask).last_hidden_state
    assert bool(text.mask.all())
    torch.testing.assert_close(text.tokens, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.tokens[0, : len(ids)], plain.encode(["a red circle"]).tokens[0, : len(ids)])


def test_width_and_size_of_an_encoder_are_known_without_loading_it(folder: Path) -> None:
    whole = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert stored(folder / "model.safetensors", ("text_model.embeddings.position_ids",)) == whole - 12


def test_every_text_setting_of_conf_is_one_and_the_public_ones_keep_all_77_positions() -> None:
    for name in ("tiny", "t5", "openclip_h", "clip_l"):
        text = parse(compose("embed", [f"text={name}", "text.precision=bfloat16"])["text"], TextConfig)
        assert (text.max_tokens, text.pad, text.negative) == ((48, False, None) if name == "tiny" else (77, True, ""))


def test_a_prior_reads_what_clip_reads(folder: Path) -> None:
    prior = {"weights": "random", "width": 16, "layers": 1, "heads": 2, "head": 8, "sampler": {"steps": 2}}
    cfg = config(folder, pad=False, mask=True, prior=prior)
    made, alone = encoder_of(cfg), encoder_of(config(folder, pad=False, mask=True))
    text = made.encode(PROMPTS)
    assert text.tokens.shape == (3, 1, 16) and made.width == known_width(cfg) == 16
    read = alone.encode(PROMPTS[1:2])
    assert isinstance(made, PriorText) and torch.equal(made.prior(read.tokens, read.mask, PROMPTS[1]), text.tokens[1])


def test_a_prior_of_others_is_not_asked_without_the_projection(folder: Path, tmp_path: Path) -> None:
    """diffusers' unCLIP tells it the projected embedding."""
    shutil.copytree(folder.parent, tmp_path / "with")
    weights = load_file(folder / "model.safetensors") | {"text_projection.weight": torch.eye(16)}
    save_file(weights, tmp_path / "with/text_encoder/model.safetensors", {"format": "pt"})
    prior = {"weights": str(tmp_path / "prior"), "width": 16, "layers": 1, "heads": 2, "head": 8}
    prior["sampler"] = {"steps": 2}
    for where, error, words in (
        (
            tmp_path / "with/text_encoder",
            ConfigError,
            r"has a text_projection, which published priors .*Fix: text\.prior",
        ),
        (folder, InputError, r"prior .*missing"),
    ):
        with pytest.raises(error, match=words):
            encoder_of(config(where, prior=prior))
    drawn = prior | {"weights": "random"}
    assert isinstance(encoder_of(config(tmp_path / "with/text_encoder", prior=drawn)), PriorText)
