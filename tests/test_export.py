"""An exported chain makes the same frames in diffusers as here, and comes back as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LEVEL, STAGES

from cascade import Cascade, checkpoint, cli, export, store
from cascade.chain import Chain
from cascade.clipfiles import read_clip
from cascade.config import package_root, plain
from cascade.errors import CascadeError, ConfigError, InputError, NumericError
from cascade.text import T5Text, TextConfig

PROMPT = "a large red circle moves left on a black background"
ODD = "Ünïcode ☃ 漢字 ﬁne ½\ttab  </s> <pad> zzqq"
ROOT = package_root()

# Loads with diffusers and nothing of ours imported by hand, as a user of a folder from somewhere would.
STRANGER = f"""
import json, sys
import torch
from diffusers import DiffusionPipeline

folder, latent, student, again, frames = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
seen = []

def callback(of, step, t, kwargs):
    seen.append([of is pipe, kwargs["stage"], step, t])
    return kwargs

out = pipe({PROMPT!r}, generator=torch.Generator().manual_seed(7), callback_on_step_end=callback)
told = {{"last_image": torch.full((3, 9, 9), 0.25), "num_frames": 15, "generator": [torch.Generator().manual_seed(7)]}}
told = pipe({PROMPT!r}, **told).video.frames
pipe.save_pretrained(again, safe_serialization=True)
named = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
named.set_progress_bar_config(disable=True)
half = named({PROMPT!r}, generator=torch.Generator().manual_seed(7))
latents = DiffusionPipeline.from_pretrained(latent, custom_pipeline=latent, trust_remote_code=True)
latents.save_pretrained(again + "-latent")
decoded = latents({PROMPT!r}, generator=torch.Generator().manual_seed(7))
made = {{"frames": out.video.frames, "told": told, "half": half.video.frames, "latent": decoded.video.frames}}
torch.save(made, frames)
ids = pipe.tokenizer([{PROMPT!r}, {ODD!r}]).input_ids
learned = DiffusionPipeline.from_pretrained(student, custom_pipeline=student, trust_remote_code=True)
learned.set_progress_bar_config(disable=True)
refused = []
for call in (
    pipe.enable_model_cpu_offload,
    lambda: pipe.save_pretrained(again, safe_serialization=False),
    lambda: pipe.save_pretrained(again, variant="fp16"),
    lambda: learned("a ring", guidance_scale={{"base": 50}}),
):
    try:
        call()
    except Exception as error:
        refused.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps({{
    "seen": seen, "ids": ids, "components": [sorted(pipe.components), sorted(latents.components)],
    "shape": out.frames.shape, "fps": out.fps,
    "dtypes": [str(pipe.dtype), str(named.dtype)], "refused": refused,
}}))
"""


@pytest.fixture(scope="module")
def folder(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain `mini`, exported by the command."""
    out = tmp_path_factory.mktemp("exported") / "mini"
    cli.command(["export", f"out={out}", "chain=mini", "--config-dir", str(mini)])
    return out


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory, autoencoder: Path) -> Cascade:
    """A base and a tsr that work on the latents of one autoencoder, with a text encoder in shards; all random."""
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = T5Config(vocab_size=512, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=4, dropout_rate=0.0)
        encoder = tmp_path_factory.mktemp("t5")
        T5EncoderModel(settings).save_pretrained(encoder, max_shard_size="8KB")
    shutil.copy(ROOT / "checkpoints/tiny/text/spiece.model", encoder)
    net = {"levels": [LEVEL], "embedding": 8, "text": 16, "head": 4, "channels": 4}
    shared = {
        "net": net,
        "diffusion": {"prediction": "v"},
        "sampler": {"steps": 2},
        "codec": {"kind": "latent", "weights": str(autoencoder), "channels": 4, "stride": 2},
        "weights": "random",
    }
    trees = {name: {"name": name, **STAGES[name], **shared} for name in ("base", "tsr")}
    return Cascade(Chain.build(["base", "tsr"], trees, TextConfig(encoder=str(encoder), max_tokens=48)))


@pytest.fixture(scope="module")
def latent_folder(latent: Cascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "latent"
    latent.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def student(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base of `mini` that a student would have: for two steps, told w from 0 to 3."""
    out = tmp_path_factory.mktemp("student") / "base"
    weights = checkpoint.load(mini / "weights" / "base")
    checkpoint.save(out, weights.state, {**weights.config, "w_range": [0.0, 3.0], "steps": 2}, card="A student.")
    return out


@pytest.fixture(scope="module")
def student_folder(mini: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "student"
    Cascade.from_pretrained("mini", "stages=[base]", f"base.weights={student}", config_dir=mini).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def stranger(
    folder: Path, latent_folder: Path, student_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What diffusers makes of the folder, in a process of its own."""
    home = tmp_path_factory.mktemp("home")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # they decide the last bits
    env = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    words = [str(folder), str(latent_folder), str(student_folder), str(home / "again"), str(home / "frames.pt")]
    done = subprocess.run([sys.executable, "-c", STRANGER, *words], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {"again": home / "again", "made": torch.load(home / "frames.pt", weights_only=True)}


def frames(pipe: Cascade) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    out: Any = pipe(PROMPT, generator=torch.Generator().manual_seed(7))
    found: torch.Tensor = out.video.frames
    return found


def test_diffusers_makes_the_same_frames(stranger: dict[str, Any], mini: Path) -> None:
    ours = Cascade.from_pretrained("mini", config_dir=mini)
    assert torch.equal(stranger["made"]["frames"], frames(ours))
    told: Any = ours(PROMPT, last_image=torch.full((3, 9, 9), 0.25), generator=torch.Generator().manual_seed(7))
    assert torch.equal(stranger["made"]["told"], told.video.frames)
    assert stranger["shape"] == [1, 15, 16, 16, 3] and stranger["fps"] == 8
    assert stranger["seen"] == [[True, name, step, t] for name in STAGES for step, t in enumerate((1.0, 0.5))]
    assert stranger["components"][0] == sorted([*STAGES, "text_encoder", "tokenizer"])


def test_a_chain_of_latents_takes_its_autoencoder_with_it(
    stranger: dict[str, Any], latent: Cascade, latent_folder: Path
) -> None:
    made = stranger["made"]["latent"]
    assert stranger["components"][1] == ["base", "base_vae", "text_encoder", "tokenizer", "tsr"]
    assert torch.equal(made, frames(latent)) and made.std() > 0.01
    again = Path(f"{stranger['again']}-latent")
    for folder in (latent_folder, again):
        moved = Cascade.from_pretrained(folder)
        assert {cfg.codec.weights for cfg in moved.chain.stages} == {str(folder.resolve() / "base_vae")}
        assert torch.equal(frames(moved), made)


def test_diffusers_in_half_precision_is_near(stranger: dict[str, Any]) -> None:
    made = stranger["made"]
    assert stranger["dtypes"] == ["torch.float32", "torch.bfloat16"]
    assert 0 < (made["half"] - made["frames"]).abs().mean() < 0.1


def test_the_tokenizer_gives_the_ids_that_the_stages_were_trained_on(stranger: dict[str, Any]) -> None:
    encoder = T5Text(TextConfig(max_tokens=1000))
    assert stranger["ids"] == [encoder.ids(PROMPT), encoder.ids(ODD)]


def test_what_diffusers_saves_is_exported_again(stranger: dict[str, Any], folder: Path) -> None:
    again = stranger["again"]
    assert store.problems(again, checkpoint.EXPORTED) == []
    for name in STAGES:
        for file in ("config.json", "diffusion_pytorch_model.safetensors", "README.md"):
            assert (again / name / file).read_bytes() == (folder / name / file).read_bytes()
    assert torch.equal(frames(Cascade.from_pretrained(again)), stranger["made"]["frames"])


def test_what_diffusers_cannot_do_here_is_said(stranger: dict[str, Any]) -> None:
    said = iter(stranger["refused"])
    assert "ValueError" in next(said)
    assert "ValueError: safe_serialization is False" in next(said)
    assert "ValueError: variant" in next(said)
    assert "ConfigError: base: sampler.guidance is 49, its weights were distilled for 0 to 3" in next(said)


def test_the_guidance_that_a_student_knows_is_asked_for_at_every_call(mini: Path, student: Path) -> None:
    pipe = Cascade.from_pretrained("mini", "stages=[base]", f"base.weights={student}", config_dir=mini)
    for scale in ({"base": 50}, {"base": 4}, {"base": 4.1}):
        if scale["base"] == 4:
            pipe(PROMPT, guidance_scale=scale)
        else:
            with pytest.raises(ConfigError, match=r"for 0 to 3\. Fix: .* in Python guidance_scale={'base': 4}"):
                pipe(PROMPT, guidance_scale=scale)


def test_the_folder_comes_back_as_the_chain_it_was(folder: Path, mini: Path, tmp_path: Path) -> None:
    ours, back = Cascade.from_pretrained("mini", config_dir=mini), Cascade.from_pretrained(folder)
    assert torch.equal(frames(ours), frames(back))
    for one, other in zip(ours.chain.stages, back.chain.stages, strict=True):
        left, right = plain(one), plain(other)
        assert (
            left.pop("train") is not None and right.pop("train") is None and left.pop("weights") != right.pop("weights")
        )
        assert left == right
    with pytest.raises(ValueError, match="safe_serialization is False, expected True"):
        back.save_pretrained(tmp_path / "again", safe_serialization=False)
    back.save_pretrained(tmp_path / "again", safe_serialization=True)
    assert store.manifest(tmp_path / "again") == store.manifest(folder)
    ours.save_pretrained(tmp_path / "again")  # replaces it, by the same
    assert store.manifest(tmp_path / "again") == store.manifest(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_nothing_in_it_tells_where_it_was_made(folder: Path, latent_folder: Path, stranger: dict[str, Any]) -> None:
    for where in (folder, latent_folder, stranger["again"], Path(f"{stranger['again']}-latent")):
        for path in where.rglob("*"):
            if path.suffix in (".json", ".py", ".md"):
                assert str(folder.parent.parent) not in path.read_text() and str(ROOT) not in path.read_text()


def test_a_folder_in_it_is_weights_for_any_command(
    folder: Path, student_folder: Path, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, beside, asked = student_folder / "base", ["--config-dir", str(mini)], [f"prompt={PROMPT}", "seed=7"]
    cli.command(
        ["generate", *asked, f"base.weights={base}", "stages=[base]", f"out={tmp_path}/run", "chain=mini", *beside]
    )
    one = read_clip((tmp_path / "run/stages/base/video.safetensors").read_bytes(), "run").frames
    cli.stage_command(
        "base", [*asked, f"weights={base}", "stage=mini_base", f"out={tmp_path}/one.safetensors", *beside]
    )
    assert torch.equal(one, read_clip((tmp_path / "one.safetensors").read_bytes(), "one").frames)
    assert torch.equal(one, frames(Cascade.from_pretrained(student_folder)))
    capsys.readouterr()
    words = ["base.sampler.guidance=1", "stages=[base]", "format=json", "chain=mini", *beside]
    cli.command(["plan", f"base.weights={base}", *words])
    assert json.loads(capsys.readouterr().out)["stages"][0]["evaluations"] == 2  # w is told to it
    mixed = Cascade.from_pretrained("mini", f"tsr.weights={folder / 'tsr'}", config_dir=mini)
    assert torch.equal(frames(mixed), frames(Cascade.from_pretrained("mini", config_dir=mini)))
    with pytest.raises(InputError, match="another architecture: kind is 'base'"):
        frames(Cascade.from_pretrained("mini", f"tsr.weights={folder / 'base'}", config_dir=mini))


def test_a_changed_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, words in (
        ("model_index.json", "model_index.json: is damaged"),
        ("base/config.json", "config.json: is damaged"),
        ("base/diffusion_pytorch_model.safetensors", "its SHA-256 is not the manifest's"),
    ):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[-3] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(InputError, match=words):
            frames(Cascade.from_pretrained(copy))


def test_what_half_precision_holds_is_kept_in_it() -> None:
    exact, other = torch.tensor([0.5, -3.0]), torch.tensor([0.1, 70000.0])
    for state, dtype in (({"a": exact}, torch.float16), ({"a": exact, "b": other}, torch.float32)):
        files = checkpoint.portable(state, {"kind": "base"}, "Model")
        back = store.bytes_to_tensors(files[checkpoint.PORTABLE])
        assert {tensor.dtype for tensor in back.values()} == {dtype}
        assert all(torch.equal(back[f"net.{name}"].float(), tensor) for name, tensor in state.items())


def test_what_is_not_finite_is_not_exported() -> None:
    with pytest.raises(NumericError, match="weights: a is not finite"):
        checkpoint.portable({"a": torch.tensor([1.0, float("nan")])}, {}, "Model")


FAULTS: list[tuple[list[str], int, str]] = [
    (["out=x", "format=onnx"], 2, "format is 'onnx', expected diffusers"),
    ([], 2, "out is missing"),
    (["out=x", "base.weights=none"], 3, "none"),
    (["out=x", "base.weights=null"], 2, "base has no weights"),
    (["out=file"], 3, "file: it exists and is not an artefact"),
    (["out=deep/x", "text.encoder=./none"], 3, "none"),
]


@pytest.mark.parametrize(("words", "code", "named"), FAULTS, ids=[" ".join(words) for words, _, _ in FAULTS])
def test_a_mistake_is_one_line_and_creates_nothing(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "mine").write_text("in the way")
    with pytest.raises(SystemExit) as exit_:
        cli.run_main(["export", *words, "chain=mini", "--config-dir", str(mini)], cli.command, "cascade")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit_.value.code == code and len(said) == 1 and named in said[0] and "Fix: " in said[0]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "file/mine"]


@pytest.mark.parametrize("name", ["to", "class", "tokenizer", "sr-1", "cascade", "_stage"])
def test_a_stage_whose_name_diffusers_could_not_take_is_refused(name: str, mini: Path, tmp_path: Path) -> None:
    pipe = Cascade.from_pretrained("mini", config_dir=mini)
    pipe.chain.stages[1].name = name
    with pytest.raises(ConfigError, match=f"stage {name}: cannot be an attribute of a diffusers pipeline"):
        pipe.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_no_chain_is_refused(tmp_path: Path) -> None:
    store.commit(tmp_path / "x", {"model_index.json": b'{"chain": 3}'}, kind=checkpoint.EXPORTED)
    with pytest.raises(InputError, match="names no chain of Cascade"):
        export.read(tmp_path / "x")
    store.commit(tmp_path / "y", {"model_index.json": b"{}"}, kind="other")
    with pytest.raises(CascadeError, match="holds 'other', expected 'pipeline'"):
        export.read(tmp_path / "y")
