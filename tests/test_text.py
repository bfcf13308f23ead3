from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from cascade import store, textfit
from cascade.config import package_root, parse
from cascade.data.captions import Spec, Thing, vocabulary
from cascade.errors import ConfigError, InputError, NumericError
from cascade.text import EmbeddingStore, Precision, T5Text, Text, TextConfig, check_prompt, named, text_source
from cascade.text.encoders import find_encoder

TINY = package_root() / "checkpoints" / "tiny" / "text"
PROMPTS = [
    "a large red circle moves left on a black background",
    "a small blue square moves up and a large white ring stands still on a gray background",
    "  Two   SPACES, a\tTab and \N{LATIN SMALL LETTER E WITH ACUTE}t\N{LATIN SMALL LETTER E WITH ACUTE}",
]


@pytest.fixture(scope="module")
def tiny() -> T5Text:
    return T5Text(TextConfig())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's T5 folder: random weights, a tokenizer without byte fallback, no manifest."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("own")
    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a dog runs on the beach", "the red dog sleeps", "a red beach"] * 10),
        model_writer=proto, vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(proto.getvalue())
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config.from_dict({**sizes, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"})  # v1.1
    torch.manual_seed(0)
    weights = {key: value.clone() for key, value in T5EncoderModel(config).state_dict().items()}
    weights["decoder.final_layer_norm.weight"] = torch.ones(16)  # as in the files of a whole T5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(config.to_json_string())
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def equal(a: Text, b: Text) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)


# Text ----------------------------------------------------------------------------------------------------------------


def text(*lengths: int, length: int = 4) -> Text:
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), length, 3, generator=torch.Generator().manual_seed(0))
    return Text(tokens * mask[:, :, None], mask)


def test_cat_pads_and_index_takes_it_apart_again() -> None:
    a, b = text(1, 4), text(2, length=2)
    both = Text.cat([a, b])
    assert both.tokens.shape == (3, 4, 3) and len(both) == 3
    assert equal(both[:2], a) and equal(both[torch.tensor([2])], b.pad(4))
    assert equal(both.to("cpu"), both)


def test_pooled_is_the_mean_of_real_tokens_and_padding_does_not_count() -> None:
    a = text(3, 0)
    torch.testing.assert_close(a.pooled()[0], a.tokens[0, :3].mean(0))
    assert torch.equal(a.pooled()[1], torch.zeros(3))
    torch.testing.assert_close(a.pad(9).pooled(), a.pooled())


def test_dropped_prompts_are_empty_prompts() -> None:
    a = text(3, 2)
    some = a.drop(torch.tensor([True, False]))
    assert equal(some[:1], a[:1]) and equal(some[1:], Text.empty(1, 4, 3))


def test_dropped_prompts_are_what_no_text_is() -> None:
    """Of other length than the prompts too, and after whatever is done to them."""
    for length in (2, 9):
        a = text(3, 2)
        a.nothing = text(2, length=length)
        whole = a.nothing.pad(max(4, length))
        for b in (a, Text.cat([a[:1], a[1:]]), a.to("cpu"), a.remembering(), a.pad(4)):
            assert equal(b.without(), Text.cat([whole, whole]))
            some = b.drop(torch.tensor([True, False]))
            assert equal(some[:1], a[:1].pad(max(4, length))) and equal(some[1:], whole)


@pytest.mark.parametrize("negative", ["", "a gray ring"])
def test_no_text_is_what_the_settings_say(negative: str, tiny: T5Text, tmp_path: Path) -> None:
    written = EmbeddingStore.create(tmp_path / "store", tiny)
    written.put([PROMPTS[0], negative], tiny)
    for where in (None, str(tmp_path / "store")):
        cfg = TextConfig(negative=negative, store=where)
        source = text_source(cfg)
        nothing = source.encode(PROMPTS[:1]).nothing
        assert nothing is not None and equal(nothing, tiny.encode([negative]))
        assert source.fingerprint == tiny.fingerprint and named(cfg, source) != named(TextConfig(), source)
        assert text_source(replace(cfg, negative=None)).encode(PROMPTS[:1]).nothing is None


# prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("", "empty"),
        (" \n\t \N{ZERO WIDTH SPACE}", "empty"),
        ("x" * 10_001, "10001 characters"),
        ("red\x00", "offset 3"),
        ("\ud800", "U\\+D800 at offset 0"),
        ("a\x1b[31m", "offset 1"),
    ],
)
def test_prompts_that_are_refused(prompt: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_prompt(prompt)


def test_prompts_are_nfc() -> None:
    assert check_prompt("e\N{COMBINING ACUTE ACCENT}") == "\N{LATIN SMALL LETTER E WITH ACUTE}"


# the encoder ---------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_sentencepiece_and_the_end_mark(tiny: T5Text) -> None:
    reference = SentencePieceProcessor(model_file=str(TINY / "spiece.model"))
    for prompt in PROMPTS:
        assert tiny.ids(prompt) == [*reference.encode(prompt), 1]


def test_a_prompt_does_not_depend_on_its_batch(tiny: T5Text) -> None:
    batch = tiny.encode(PROMPTS)
    assert batch.tokens.shape == (3, 64, tiny.width) and batch.tokens.dtype == torch.float32
    for b, prompt in enumerate(PROMPTS):
        assert equal(tiny.encode([prompt]), batch[b : b + 1])
        assert int(batch.mask[b].sum()) == len(tiny.ids(prompt))
    assert not batch.tokens[~batch.mask].any()


def test_padding_inside_t5_would_change_nothing_but_the_last_bits(tiny: T5Text) -> None:
    from transformers import T5EncoderModel

    alone = tiny.encode(PROMPTS)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tiny.ids(prompt)) for prompt in PROMPTS], batch_first=True)
    plain = T5EncoderModel.from_pretrained(TINY, dtype=torch.float32)  # the folder is an ordinary T5
    with torch.no_grad():
        padded = plain(input_ids=ids, attention_mask=ids != 0).last_hidden_state
    real = alone.mask[:, : ids.shape[1]]
    torch.testing.assert_close(padded[real], alone.tokens[alone.mask], atol=1e-5, rtol=0)


def test_tokens_have_unit_variance(tiny: T5Text) -> None:
    out = tiny.encode(PROMPTS[:2])
    assert 0.8 < out.tokens[out.mask].std() < 1.25


def test_every_word_of_the_captions_has_pieces_and_any_other_text_is_spelled_in_bytes(
    tiny: T5Text, caplog: pytest.LogCaptureFixture
) -> None:
    for word in vocabulary():
        ids = tiny.tokenizer.encode(word)
        assert ids and not any(tiny.tokenizer.is_unknown(i) or tiny.tokenizer.is_byte(i) for i in ids), word
    points = [*range(32, 0xD800, 97), *range(0xE000, 0x110000, 9973)]
    for point in points:
        assert not any(map(tiny.tokenizer.is_unknown, tiny.tokenizer.encode(f"a {chr(point)}")))
    with caplog.at_level(logging.WARNING, "cascade"):
        tiny.encode(["a red \N{SNOWMAN}", "a red \N{SNOWMAN}"])
    assert [r.message for r in caplog.records] == ["prompt: words the text encoder can only spell out: \N{SNOWMAN}"]


def test_a_prompt_that_is_cut_says_what_is_lost(caplog: pytest.LogCaptureFixture, own: Path) -> None:
    short = T5Text(TextConfig(encoder=str(own), max_tokens=5))
    whole = T5Text(TextConfig(encoder=str(own), max_tokens=30))
    ids = whole.ids("a dog runs on the beach")
    with caplog.at_level(logging.WARNING, "cascade"):
        assert short.ids("a dog runs on the beach") == [*ids[:4], 1]
    assert caplog.records[-1].message.endswith(f"ignored: {whole.tokenizer.decode(ids[4:-1])}")


def test_any_t5_folder_works_and_unknown_words_warn(caplog: pytest.LogCaptureFixture, own: Path) -> None:
    encoder = text_source(parse({"encoder": str(own), "max_tokens": 12}, TextConfig))
    with caplog.at_level(logging.WARNING, "cascade"):
        out = encoder.encode(["the dog \N{SNOWMAN}"])
    assert out.tokens.shape == (1, 12, 16) and encoder.width == 16
    assert [r.message for r in caplog.records] == ["prompt: words the text encoder does not know: \N{SNOWMAN}"]


def test_shards_hold_the_same_encoder_as_one_file(own: Path, tmp_path: Path) -> None:
    folder = copy(own, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(sorted(weights))}
    for name in set(names.values()):
        save_file({key: weights[key] for key in names if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    one, shards = (T5Text(TextConfig(encoder=str(path))) for path in (own, folder))
    assert equal(one.encode(["a red dog"]), shards.encode(["a red dog"]))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-1\.safetensors"):
        T5Text(TextConfig(encoder=str(folder)))


def test_half_precision_weights_give_float32_embeddings(own: Path) -> None:
    full, half = (T5Text(TextConfig(encoder=str(own), precision=precision)) for precision in Precision)
    a, b = full.encode(["a red dog"]), half.encode(["a red dog"])
    assert b.tokens.dtype == torch.float32 and full.fingerprint != half.fingerprint
    torch.testing.assert_close(a.tokens, b.tokens, atol=0.1, rtol=0.1)


def test_loading_leaves_global_randomness_alone(own: Path) -> None:
    before = torch.get_rng_state()
    assert T5Text(TextConfig(encoder=str(own))).model
    assert torch.equal(before, torch.get_rng_state())


def test_the_fingerprint_is_of_the_content(own: Path, tmp_path: Path) -> None:
    folder = copy(own, tmp_path)
    first = T5Text(TextConfig(encoder=str(own))).fingerprint
    assert T5Text(TextConfig(encoder=str(folder))).fingerprint == first
    weights = load_file(folder / "model.safetensors")
    weights["shared.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    assert T5Text(TextConfig(encoder=str(folder))).fingerprint != first


def test_a_manifest_is_checked(own: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in own.iterdir()}
    folder = store.commit(tmp_path / "verified", files, kind="text")
    plain = T5Text(TextConfig(encoder=str(own)))
    verified = T5Text(TextConfig(encoder=str(folder)))
    assert verified.fingerprint == plain.fingerprint
    assert equal(verified.encode(["a red dog"]), plain.encode(["a red dog"]))
    data = bytearray(files["model.safetensors"])
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="SHA-256"):
        T5Text(TextConfig(encoder=str(folder)))


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "spiece.model", "model.safetensors"])
def test_missing_and_damaged_files_are_named(own: Path, tmp_path: Path, name: str) -> None:
    folder = copy(own, tmp_path)
    (folder / name).write_bytes(b"\x80\x04 not what it says")
    with pytest.raises(InputError, match=name):
        assert T5Text(TextConfig(encoder=str(folder))).model
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} missing, it has "):
        T5Text(TextConfig(encoder=str(folder)))


def test_weights_that_do_not_fit_are_listed(own: Path, tmp_path: Path) -> None:
    folder = copy(own, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.extra"] = torch.ones(1)
    weights["encoder.final_layer_norm.weight"] = torch.ones(15)
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        assert T5Text(TextConfig(encoder=str(folder))).model
    for part in ("encoder.extra unknown", "weight [15] instead of [16]", "1.layer.0.SelfAttention.q.weight missing"):
        assert part in str(error.value)


def test_weights_that_are_not_finite_are_refused(own: Path, tmp_path: Path) -> None:
    folder = copy(own, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["shared.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(NumericError, match=r"shared\.weight"):
        assert T5Text(TextConfig(encoder=str(folder))).model


def test_a_tokenizer_of_another_model_is_refused(own: Path, tmp_path: Path) -> None:
    folder = copy(own, tmp_path)
    shutil.copy(TINY / "spiece.model", folder)
    with pytest.raises(InputError, match="the weights know 48"):
        assert T5Text(TextConfig(encoder=str(folder))).model


def test_folders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in (tmp_path / "none", tmp_path / "loop", "~nobody-of-that-name/encoder"):
        with pytest.raises(InputError, match="is not a folder"):
            find_encoder(str(name))
    assert find_encoder("tiny/text") == TINY

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"google/t5-v1_1-none@main.*cannot be fetched.*Fix: set encoder to a folder"):
        find_encoder("google/t5-v1_1-none@main")


@pytest.mark.parametrize("tree", [{"max_tokens": 1}, {"max_tokens": 10**9}, {"encoder": " "}, {"precision": "float16"}])
def test_settings_that_are_refused(tree: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse(tree, TextConfig, "text")


# the store -----------------------------------------------------------------------------------------------------------


def test_a_store_gives_what_the_encoder_gives_without_t5_in_the_process(tiny: T5Text, tmp_path: Path) -> None:
    written = EmbeddingStore.create(tmp_path / "store", tiny)
    assert written.put([*PROMPTS, PROMPTS[0]], tiny) == 3
    assert written.put(PROMPTS, tiny) == 0
    source = text_source(TextConfig(store=str(tmp_path / "store")))
    assert (source.width, source.fingerprint) == (tiny.width, tiny.fingerprint)
    assert equal(source.encode(PROMPTS[::-1]), tiny.encode(PROMPTS[::-1]))
    program = (
        "import sys; from cascade.text import TextConfig, text_source;"
        "text_source(TextConfig(store=sys.argv[1])).encode([sys.argv[2]]);"
        "sys.exit('transformers' in sys.modules or 'sentencepiece' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store"), PROMPTS[0]]
    subprocess.run(command, check=True, cwd=package_root())


def test_a_store_refuses_what_it_does_not_hold(own: Path, tiny: T5Text, tmp_path: Path) -> None:
    encoder = T5Text(TextConfig(encoder=str(own)))
    filled = EmbeddingStore.create(tmp_path, encoder)
    filled.put(["a red dog"], encoder)
    with pytest.raises(InputError, match=r"no embedding of 'a blue dog'.*cascade embed prompts=FILE out="):
        filled.encode(["a red dog", "a blue dog"])
    with pytest.raises(ConfigError, match="another encoder"):
        EmbeddingStore.create(tmp_path, tiny)
    with pytest.raises(ConfigError, match=r"text\.max_tokens=64"):
        text_source(TextConfig(store=str(tmp_path), max_tokens=32))
    with pytest.raises(InputError, match=r"has no index\.json"):
        text_source(TextConfig(store=str(tmp_path / "none")))


@pytest.mark.parametrize("tokens", [torch.ones(3, 15), torch.full((3, 16), torch.inf), torch.ones(3, 16).half()])
def test_a_store_refuses_damaged_embeddings(own: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    filled = EmbeddingStore.create(tmp_path, T5Text(TextConfig(encoder=str(own))))
    path = filled.path("a red dog")
    path.write_bytes(store.tensors_to_bytes({"tokens": tokens}))
    with pytest.raises(InputError, match=f"{path.name}: is damaged"):
        filled.encode(["a red dog"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is not a safetensors file"):
        filled.encode(["a red dog"])


# the recipe of the tiny encoder --------------------------------------------------------------------------------------


def test_answers_number_things_as_the_caption_mentions_them() -> None:
    spec = Spec((Thing("ring", "red", "small", "grows"), Thing("star", "white", "large", "moves up")), "navy")
    answers = textfit.answers(spec, "on navy a white star rises, a red ring grows")
    words = [classes[answer] for classes, answer in zip(textfit.slots().values(), answers, strict=True)]
    assert words[:4] == ["star", "white", "large", "moves up"]
    assert words[4:] == ["ring", "red", "small", "grows", "navy", "2"]
    alone = textfit.answers(Spec(spec.things[:1], "navy"), "a red ring")
    assert alone[4:8] == [0, 0, 0, 0] and alone[-1] == 0


def test_the_recipe_makes_an_encoder_of_unit_variance_and_the_same_one_again(tmp_path: Path) -> None:
    cfg = textfit.FitConfig(steps=3, batch=4, warmup=1, captions=300, judged=4)
    first, second = (textfit.fit(tmp_path / name, cfg) for name in "ab")
    assert first == second and abs(first.std - 1) < 1e-5
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "manifest.json", "model.safetensors", "spiece.model"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert T5Text(TextConfig(encoder=str(tmp_path / "a"))).encode(PROMPTS).tokens.isfinite().all()
    made, shipped = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "a", TINY))
    assert made == shipped
