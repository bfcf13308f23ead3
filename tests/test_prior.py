"""Laws of the prior: what a prompt is to the stages, whose noise it is, whose weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import embed, foreign
from cascade.chain import Chain
from cascade.errors import ConfigError, InputError
from cascade.planning.plan import plan
from cascade.sampling.sampler import Sampler
from cascade.text import EmbeddingStore, PriorText, Text, TextConfig, encoder_of, known_width, told_tokens
from cascade.text.prior import NAME, Prior, PriorConfig

WIDTH, TOKENS = 12, 6
CFG = PriorConfig(
    weights="random", width=WIDTH, layers=1, heads=2, head=8, sampler=Sampler(steps=3, guidance=1.0)
)  # fmt: skip
PROMPTS = ("a red circle", "two stars")


class Words:
    """A text encoder of WIDTH: a word is noise keyed by it."""

    width, fingerprint = WIDTH, "words"
    cfg = TextConfig(max_tokens=TOKENS)

    def encode(self, prompts: Sequence[str]) -> Text:
        text = Text.empty(len(prompts), TOKENS, WIDTH)
        for b, prompt in enumerate(prompts):
            for i, word in enumerate(prompt.split()):
                text.tokens[b, i] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(word.encode())))
                text.mask[b, i] = True
        return text


@pytest.fixture(scope="module")
def prior() -> Prior:
    return CFG.open(TOKENS)


def read(prompt: str) -> tuple[Tensor, Tensor]:
    text = Words().encode([prompt])
    return text.tokens, text.mask


def test_a_prompt_is_one_token_whatever_stands_beside_it() -> None:
    source = PriorText(Words(), CFG)
    both, turned = source.encode(PROMPTS), source.encode(PROMPTS[::-1])
    assert both.tokens.shape == (2, 1, WIDTH) and both.mask.all() and source.width == WIDTH
    assert torch.equal(both.tokens, turned.tokens.flip(0))
    assert torch.equal(both.tokens[:1], source.encode(PROMPTS[:1]).tokens)
    assert (both.tokens[0] - both.tokens[1]).abs().max() > 0.01
    assert source.fingerprint != PriorText(Words(), replace(CFG, seed=1)).fingerprint
    assert (source.encode(PROMPTS).tokens - PriorText(Words(), replace(CFG, seed=1)).encode(PROMPTS).tokens).any()


def test_the_empty_prompt_is_a_prompt_and_may_be_what_no_text_is() -> None:
    class Silent(Words):
        cfg = TextConfig(max_tokens=TOKENS, negative="")

    text, said = PriorText(Silent(), CFG).encode(["", "a"]), PriorText(Words(), CFG).encode(["", "a"])
    assert text.nothing is not None and torch.equal(text.nothing.tokens, text.tokens[:1])
    assert torch.equal(said.tokens, text.tokens) and said.nothing is None
    assert torch.equal(text.drop(torch.tensor([True, False])).tokens[1], text.tokens[0])


def test_text_reaches_the_stages_through_the_prior_alone() -> None:
    """A prior that does not listen makes the same of every text: what differs is the noise, keyed by the prompt."""
    deaf = CFG.open(TOKENS)
    for layer in (deaf.model.encoder_hidden_states_proj, deaf.model.embedding_proj):
        layer.weight.zero_()
    said = [deaf(*read(prompt), "key") for prompt in ("a red circle", "two blue stars")]
    assert torch.equal(*said)
    assert (CFG.open(TOKENS)(*read("a red circle"), "key") - CFG.open(TOKENS)(*read("two blue stars"), "key")).any()


def test_a_sentence_is_its_end_mark_unprojected_and_no_text_is_zeros(prior: Prior) -> None:
    """Not as diffusers' unCLIP asks published priors."""
    tokens, mask = read(PROMPTS[0])
    z = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    whole = tokens[:, 2]
    expected = prior.model(z, torch.tensor([250.0]), whole, tokens, mask).predicted_image_embedding
    got = prior.say(tokens, mask, z[..., None, None, None], torch.tensor([0.25]))
    assert (got.flatten(1) - expected).abs().max() < 1e-6
    nothing = prior.model(z, torch.tensor([250.0]), 0 * whole, 0 * tokens, torch.zeros_like(mask))
    dropped = prior.say(tokens * 0, mask & False, z[..., None, None, None], torch.tensor([0.25]))
    assert (dropped.flatten(1) - nothing.predicted_image_embedding).abs().max() < 1e-6
    padded = tokens.clone()
    padded[:, 4:] = 7.0  # behind the text
    assert (prior.say(padded, mask, z[..., None, None, None], torch.tensor([0.25])) - got).abs().max() < 1e-5


def test_what_the_network_is_sure_of_comes_out_in_the_scale_of_pictures() -> None:
    """x_hat = c at every step gives c; clip_std and clip_mean of the weights turn it into an embedding."""
    sure = torch.linspace(-1, 1, WIDTH)[None]

    class Sure(torch.nn.Module):
        def forward(self, *_: Any) -> Any:
            return SimpleNamespace(predicted_image_embedding=sure)

        def post_process_latents(self, x: Tensor) -> Tensor:
            return 3 * x + 0.5

    assert torch.equal(Prior(CFG, Sure(), "cpu", "sure")(*read(PROMPTS[0]), "a"), 3 * sure + 0.5)


# weights -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, prior: Prior) -> Path:
    with foreign.quiet("diffusers"):
        prior.model.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def test_a_folder_of_diffusers_is_a_prior(folder: Path, prior: Prior) -> None:
    loaded = replace(CFG, weights=str(folder)).open(TOKENS)
    assert (loaded(*read("a"), "a") - prior(*read("a"), "a")).abs().max() < 1e-5  # weights may lie elsewhere in a page
    assert loaded.hash != prior.hash


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 2}, "has num_layers 1, but the settings say 2"),
        ({"width": 16}, "has embedding_dim 12, but the settings say 16"),
    ],
)
def test_weights_of_another_shape_are_refused(folder: Path, changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(CFG, weights=str(folder), **changes).open(TOKENS)
    with pytest.raises(InputError, match="has num_embeddings 6, but the settings say 7"):
        replace(CFG, weights=str(folder)).open(7)


def test_what_is_no_prior_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the prior has no weights\. Fix: text\.prior\.weights=DIRECTORY"):
        replace(CFG, weights=None).open(TOKENS)
    with pytest.raises(InputError, match=r"prior .*/nowhere: .* missing, it is not a folder"):
        replace(CFG, weights=str(folder / "nowhere")).open(TOKENS)
    config = folder / foreign.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(InputError, match=f"is of AutoencoderKL, not {NAME}"):
        replace(CFG, weights=str(folder)).open(TOKENS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"sampler": Sampler(steps=2, shared_noise=True)}, "sampler has a setting for videos"),
    ],
)
def test_impossible_priors_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CFG, **changes)


# in a chain ----------------------------------------------------------------------------------------------------------

TINY = TextConfig(max_tokens=16, prior=replace(CFG, width=128))  # checkpoints/tiny/text is 128 wide


def chain(text: TextConfig, stage_config: Any, net_config: Any, width: int) -> Chain:
    from cascade.config import plugin

    made = Chain([stage_config("base", net=net_config(text=width))], [plugin("base")], text)  # type: ignore[list-item]
    made.check()
    return made


def test_a_chain_reads_what_the_prior_makes(stage_config: Any, net_config: Any) -> None:
    assert known_width(TINY) == 128 and told_tokens(TINY) == 1
    elsewhere = replace(TINY, encoder="/nowhere", prior=CFG)
    assert known_width(elsewhere) == WIDTH
    others = plan(chain(elsewhere, stage_config, net_config, WIDTH)).others
    assert [(other.kind, other.params) for other in others[:1]] == [("text encoder", None)]
    assert (others[1].kind, others[1].params) == ("prior", sum(p.numel() for p in CFG.open(16).model.parameters()))
    with pytest.raises(ConfigError, match=r"net\.text is 6, but the embeddings of text\.prior are 12 wide"):
        chain(elsewhere, stage_config, net_config, 6)
    with pytest.raises(ConfigError, match=r"text\.prior\.width is 12, but the embeddings of tiny/text are 128 wide"):
        chain(replace(TINY, prior=CFG), stage_config, net_config, WIDTH)


def test_embeddings_of_a_prior_may_be_stored(tmp_path: Path) -> None:
    text = {"max_tokens": 16, "prior": {"weights": "random", "width": 128, "layers": 1, "heads": 2, "head": 8}}
    text["prior"] |= {"sampler": {"steps": 2}}  # type: ignore[operator]
    embed.verb({"text": text, "prompt": PROMPTS[0], "out": str(tmp_path / "store")})()
    stored = EmbeddingStore(tmp_path / "store").encode([PROMPTS[0]])
    sampler = Sampler(steps=2)
    made = encoder_of(replace(TINY, prior=replace(CFG, width=128, sampler=sampler))).encode([PROMPTS[0]])
    assert torch.equal(stored.tokens[:, :1], made.tokens) and stored.mask.sum() == 1
