"""Weights from elsewhere: GPT-2 from a folder, and a checkpoint of ours for another architecture."""

import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from bsbr_pl.attention import ARCHITECTURES, BSBRAttention, SlidingWindowAttention, StandardAttention
from bsbr_pl.convert import load_gpt2, name_and_digest, start_from
from bsbr_pl.evals.certificate import certify
from bsbr_pl.evals.checkpoints import read, read_all
from bsbr_pl.evals.evaluation import Evaluation
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import Results

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests/data_files/gpt2"  # its make.py says where it is from
POSITIONS, VOCABULARY, WIDTH = 48, 257, 32


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "logits.safetensors")


def gpt2(ids: torch.Tensor) -> torch.Tensor:
    """The equations of GPT-2, token by token and head by head, on the tensors as they lie in the file."""
    w = load_file(FOLDER / "model.safetensors")
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in w.items()}

    def norm(x, name):
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(ids.tolist())]
    for layer in ("h.0", "h.1"):
        qkv = [linear(norm(x_t, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(WIDTH) for x_t in x]
        for t in range(len(x)):
            heads = []
            for part in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
                scores = torch.stack([qkv[t][0][part] @ qkv[j][1][part] / math.sqrt(WIDTH / 2) for j in range(t + 1)])
                heads.append(sum(p * qkv[j][2][part] for j, p in enumerate(scores.softmax(0))))
            x[t] = x[t] + linear(torch.cat(heads), f"{layer}.attn.c_proj")
        for t in range(len(x)):
            h = linear(norm(x[t], f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
            gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x[t] = x[t] + linear(gelu, f"{layer}.mlp.c_proj")
    return torch.stack([norm(x_t, "ln_f") @ w["wte.weight"].T for x_t in x])


def test_gpt2_has_the_logits_of_hugging_face_and_of_its_equations(reference):
    ids, module = reference["ids"], load_gpt2(FOLDER)
    with torch.no_grad():
        logits = module(ids)
        torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(module.double()(ids)[0], gpt2(ids[0]), rtol=0, atol=1e-10)
    assert logits.std() > 1
    certificate = certify(module.model)
    assert certificate.passed
    assert certificate.length == POSITIONS - 1


@pytest.mark.parametrize(
    "attention",
    [
        functools.partial(SlidingWindowAttention, window_size=POSITIONS),
        functools.partial(BSBRAttention, chunk_size=POSITIONS),
        functools.partial(BSBRAttention, chunk_size=16),
    ],
)
def test_gpt2_of_another_architecture_sees_what_it_reaches(attention, reference):
    """BSBR's gain is 0 to start with, its convolution the identity: in the first chunk exactly GPT-2; after it, not."""
    module = load_gpt2(FOLDER, attention)
    reach = next(iter(attention.keywords.values()))
    with torch.no_grad():
        logits = module(reference["ids"])
    torch.testing.assert_close(logits[:, :reach], reference["logits"][:, :reach], rtol=0, atol=1e-4)
    assert reach == POSITIONS or not torch.allclose(logits[:, reach:], reference["logits"][:, reach:], atol=0.1)


def test_positions_are_known_in_decoding_and_end(reference):
    model, ids = load_gpt2(FOLDER).double().model, reference["ids"]
    with torch.no_grad():
        logits, states = model(ids), model.prefill(ids[:, :20])[1]
        for t in range(20, POSITIONS):
            step, states = model.step(ids[:, t], states)
            torch.testing.assert_close(step, logits[:, t], rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match=r"^a text must have at most 48 tokens \(positions\), got 49$"):
            model.step(ids[:, 0], states)
        too_long = torch.cat((ids, ids[:, :1]), 1)
        for read in (model, model.prefill, model.get_attention_weights, lambda ids: model.generate(ids[:, :10], 40)):
            with pytest.raises(ValueError, match=r"at most 48 tokens \(positions\), got 49"):
                read(too_long)
        assert model.generate(ids[:, :10], 39).shape == (1, 49)  # the last one is never read


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors") | {name: tensor}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


def cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])


DAMAGES = [
    (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
    (lambda folder: (folder / "model.safetensors").unlink(), "No such file.*model.safetensors"),
    (lambda folder: cut(folder, "config.json"), "."),
    (lambda folder: cut(folder, "model.safetensors"), "."),
    (lambda folder: change_config(folder, model_type="llama"), "model_type is 'llama', not 'gpt2'"),
    (lambda folder: change_config(folder, n_head="gone"), "config.json lacks 'n_head'"),
    (lambda folder: change_config(folder, n_layer=3), "model.safetensors lacks h.2.ln_1.weight"),
    (lambda folder: change_config(folder, n_layer=1), "what is h.1.attn.c_attn.bias"),
    (lambda folder: change_config(folder, n_layer=10**9), "n_layer is 1000000000, but there are 28 tensors"),
    (
        lambda folder: change_config(folder, vocab_size=10**12),
        "vocab_size=1000000000000 is too large",
    ),
    (lambda folder: change_config(folder, n_head=3), "hidden_dim must be a multiple of num_heads, got 32 and 3"),
    (lambda folder: change_config(folder, activation_function="relu"), "activation_function must be 'gelu_new', got"),
    (lambda folder: change_config(folder, layer_norm_epsilon=1e-6), "layer_norm_epsilon must be 1e-05, got 1e-06"),
    (lambda folder: change_weights(folder, "transformer.h.1.mlp.c_fc.bias", None), "lacks h.1.mlp.c_fc.bias"),
    (lambda folder: change_weights(folder, "score.weight", torch.ones(2, 2)), "what is score.weight"),
    (
        lambda folder: change_weights(folder, "transformer.h.1.mlp.c_fc.weight", torch.ones(32, 127)),
        r"config.json makes branches.3.inner.into.weight \(128, 32\), not \(127, 32\)",
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_what_is_no_gpt2_is_said_in_a_sentence(damage, words, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(FOLDER, folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"gpt2 holds no GPT-2 of Hugging Face's that can be read: .*{words}") as error:
        load_gpt2(folder)
    assert "\n" not in str(error.value)


def test_names_and_masks_as_on_the_hub(tmp_path, reference):
    """Older files name their tensors without a prefix, and hold the masks and the tied head."""
    shutil.copytree(FOLDER, tmp_path / "gpt2")
    weights = load_file(FOLDER / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    more = {"lm_head.weight": weights["wte.weight"].clone(), "h.0.attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS)}
    save_file(weights | more, tmp_path / "gpt2/model.safetensors")
    torch.testing.assert_close(load_gpt2(tmp_path / "gpt2")(reference["ids"]), reference["logits"], rtol=0, atol=1e-4)


SMALL = {"vocab_size": 17, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[LanguageModule, Path]:
    """A Standard module with no tensor at its start, and its checkpoint."""
    torch.manual_seed(0)
    module = LanguageModule(StandardAttention, **SMALL)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("trained") / "standard.ckpt"
    content = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, path)
    return module, path


LEFT = {  # of a layer, where a trained Standard has no tensor of the name
    "standard": set(),
    "sliding_window": set(),
    "bsbr": {"gain", "chunk_query.weight", "chunk_key.weight", "conv.weight"},
    "hopfield": {"beta"},
    "linear": {"conv.weight"},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_both_have_is_copied_and_what_one_has_is_named(name, trained):
    standard, path = trained
    other = LanguageModule(ARCHITECTURES[name], **SMALL)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    left = start_from(other, path)
    assert set(left) == {f"model.branches.{i}.inner.{key}" for i in (0, 2) for key in LEFT[name]}
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[key] if key in left else standard.state_dict()[key])
    assert other.initial_weights == name_and_digest(path)
    ids = torch.arange(17)[None]
    if name not in ("hopfield", "linear"):  # no chunk and no window ends within these
        torch.testing.assert_close(other(ids), standard(ids), rtol=1e-4, atol=1e-5)


def test_the_start_of_a_run_is_known_by_its_bytes_and_not_by_its_folder(tmp_path):
    found = []
    for folder, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "start.ckpt").write_bytes(content)
        found.append(name_and_digest(tmp_path / folder / "start.ckpt"))
    assert found[0] != found[1]
    assert found[0] == found[2]
    assert all(re.fullmatch(r"start\.ckpt \([0-9a-f]{8}\)", one) for one in found)
    shutil.copytree(FOLDER, tmp_path / "gpt2")
    assert name_and_digest(tmp_path / "gpt2") == name_and_digest(FOLDER)
    change_config(tmp_path / "gpt2", n_inner=64)
    assert name_and_digest(tmp_path / "gpt2") != name_and_digest(FOLDER)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vocab_size": 18}, ", but one with vocab_size=17"),
        ({"hidden_dim": 32, "ff_dim": 64}, ", but one with hidden_dim=16"),
        ({"num_layers": 3, "num_heads": 1}, ", but one with num_layers=2, num_heads=2"),
        ({"ff_dim": 32}, ", but one with ff_dim=64"),
        ({"positions": 9, "ff_activation": "gelu"}, ", but one with positions=0, ff_activation='relu2'"),
        ({"norm": "rms", "tie_embeddings": False}, ", but one with norm='layer', tie_embeddings=True"),
        ({"attention": functools.partial(BSBRAttention, rope=False)}, "'s attention, but one with rope=True"),
        (
            {"attention": functools.partial(SlidingWindowAttention, rope_base=1e5)},
            "'s attention, but one with rope_base=10000.0",
        ),
        (
            {"attention": functools.partial(SlidingWindowAttention, num_kv_heads=1)},
            "'s attention: it has no place for .*branches.0.inner.qkv.weight",
        ),
        ({"attention": ARCHITECTURES["gau"]}, "'s attention: it has no place for .*branches.0.inner.qkv.*others"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(arguments, words, trained):
    module = LanguageModule(**{"attention": BSBRAttention, **SMALL} | arguments)
    with pytest.raises(ValueError, match=rf"^the weights of .*standard.ckpt do not fit this model{words}") as error:
        start_from(module, trained[1])
    assert "\n" not in str(error.value)


def test_weights_of_the_later_options_are_copied(tmp_path):
    """A form of today: RMSNorm, SwiGLU, a head of its own, grouped queries, normed and partly rotated."""
    options = {"rope_base": 500.0, "rope_fraction": 0.5, "qk_norm": True, "num_kv_heads": 1}
    sizes = SMALL | {"norm": "rms", "ff_activation": "swiglu", "tie_embeddings": False}
    standard = LanguageModule(functools.partial(StandardAttention, **options), **sizes)
    with torch.no_grad():
        for parameter in standard.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    content = {"hyper_parameters": dict(standard.hparams), "state_dict": standard.state_dict()}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "standard.ckpt")
    window = LanguageModule(functools.partial(SlidingWindowAttention, window_size=9, **options), **sizes)
    assert start_from(window, tmp_path / "standard.ckpt") == []
    ids, again = torch.arange(9)[None], LanguageModule.load(tmp_path / "standard.ckpt")
    torch.testing.assert_close(window(ids), standard(ids), rtol=1e-4, atol=1e-5)
    assert torch.equal(again(ids), standard(ids))
    assert again.hparams == standard.hparams
    with pytest.raises(ValueError, match="'s attention, but one with rope_base=500"):
        start_from(LanguageModule(BSBRAttention, **sizes), tmp_path / "standard.ckpt")


def test_a_checkpoint_from_before_these_options_can_be_read(trained, tmp_path):
    content = torch.load(trained[1], weights_only=True)
    for name in ("positions", "ff_activation", "ff_bias", "norm", "tie_embeddings", "bottleneck"):
        del content["hyper_parameters"][name]
    torch.save(content, tmp_path / "old.ckpt")
    assert start_from(LanguageModule(StandardAttention, **SMALL), tmp_path / "old.ckpt") == []
    other = LanguageModule(BSBRAttention, **SMALL)
    with pytest.raises(ValueError, match=r"but one with attention=\{[^{]*StandardAttention[^{]*\{\}\}$"):
        other.on_load_checkpoint(content)


TEXT = "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(200))
OPTIONS = [
    *("--data.source=text.txt", "--data.tokenizer=bytes", "--data.context_length=32", "--data.batch_size=4"),
    *("--data.cache_dir=cache", "--trainer.accelerator=cpu", "--trainer.val_check_interval=3"),
]
CALLBACKS = """
trainer:
  callbacks:
    - class_path: callbacks.RunRecorder
    - class_path: callbacks.LastCheckpoint
    - class_path: callbacks.RunSummary
"""
SIZE = ["--model.hidden_dim=16", "--model.num_heads=2", "--model.num_layers=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "few.yaml").write_text(CALLBACKS)
    return tmp_path


def main(command: str, name: str, *options: str) -> train.CLI:
    return train.main([command, f"--config={ROOT / 'configs' / name}.yaml", "--config=few.yaml", *OPTIONS, *options])


def test_a_trained_model_becomes_bsbr_and_heals(folder, caplog):
    main("fit", "standard", *SIZE, "--trainer.max_steps=30", "--trainer.val_check_interval=30")
    source = "runs/version_0/checkpoints/last.ckpt"
    record = json.loads(Path("runs/version_0/record.json").read_text())
    assert record["run"]["arguments"]["initial_weights"] is None
    (standard,) = record["metrics"]["val/loss"]["value"]

    start = [*SIZE, f"--initial_weights={source}"]
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        same = main("validate", "bsbr", *start).trainer.callback_metrics["val/loss"]  # one chunk: not yet another model
    assert float(same) == pytest.approx(standard, rel=1e-5)
    lines = [line for line in caplog.messages if line.startswith("The weights are those of")]
    left = "chunk_key.weight, chunk_query.weight, conv.weight, gain"
    assert lines == [f"The weights are those of {source}; left at their start: {left}"]

    heal = [*start, "--model.attention.chunk_size=4", "--model.learning_rate=1e-3"]
    converted = float(main("validate", "bsbr", *heal).trainer.callback_metrics["val/loss"])
    main("fit", "bsbr", *heal, "--trainer.max_steps=3", "--trainer.logger.init_args.version=healed")
    start_of_it = name_and_digest(source)
    Path(source).unlink()
    run = Path("runs/healed")
    healed = json.loads((run / "record.json").read_text())
    assert healed["run"]["arguments"]["initial_weights"] == start_of_it
    assert standard < healed["metrics"]["val/loss"]["value"][0] < converted < math.log(257) - 0.5

    last = LanguageModule.load(run / "checkpoints/last.ckpt")
    assert last.initial_weights == start_of_it
    assert last.model.attentions[0].gain.abs().min() > 0
    assert read(run / "checkpoints/last.ckpt").config["initial_weights"] == start_of_it
    more = ["--trainer.max_steps=6", "--ckpt_path=last", "--trainer.logger.init_args.version=healed"]
    assert main("fit", "bsbr", *heal, *more).trainer.global_step == 6
    resumed = json.loads((run / "record.json").read_text())
    assert (resumed["resumed_at_step"], resumed["run"]["arguments"]["initial_weights"]) == (3, start_of_it)
    with pytest.raises(ValueError, match=r"version_0/checkpoints/last.ckpt is not a readable checkpoint: No such"):
        main("fit", "bsbr", *heal, "--trainer.max_steps=3")


def test_gpt2_trains_on_from_the_command_line(folder):
    options = [
        *("--model.hidden_dim=32", "--model.num_heads=2", "--model.num_layers=2", "--model.positions=48"),
        *("--model.ff_activation=gelu", "--model.ff_bias=true", "--model.attention.bias=true"),
        *("--model.attention.rope=false", "--model.attention.chunk_size=8", f"--initial_weights={FOLDER}"),
        "--model.learning_rate=1e-4",
    ]
    cli = main("fit", "bsbr", *options, "--trainer.max_steps=3")  # ends with a text of 48 tokens, rather than 200
    again = LanguageModule.load("runs/version_0/checkpoints/last.ckpt")
    assert again.hparams == cli.model.hparams
    assert again.initial_weights == name_and_digest(FOLDER)
    ids = torch.arange(VOCABULARY)[None, :POSITIONS]
    torch.testing.assert_close(again(ids), cli.model(ids), rtol=1e-5, atol=1e-5)
    gpt2_logits = load_gpt2(FOLDER)(ids).detach()
    first = F.mse_loss(again(ids)[:, :8], gpt2_logits[:, :8])  # three small steps away from it
    assert 0 < first < 0.5 * gpt2_logits[:, :8].var()

    evaluation = Evaluation(Results(folder / "rows.jsonl"), rounds=1)
    subjects = [checkpoint.subject() for checkpoint in read_all(["runs"], trusted=True)]
    evaluation.run(
        subjects, multiples=[1, 2], lengths=[16, POSITIONS]
    )  # leaves out what is longer than its positions: 64 tokens of text, and one more after 48
    assert evaluation.problems == []
    measured = [(row["identity"]["kind"], row["identity"].get("length")) for row in evaluation.results.rows]
    assert sorted(measured, key=str) == [
        *(("certificate", None), ("cost", 16), ("map", None), ("text", 32), ("training", None))
    ]


@pytest.mark.parametrize(
    "change", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"add_cross_attention": True}]
)
def test_a_gpt2_with_other_equations_is_refused(change, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "gpt2")
    change_config(tmp_path / "gpt2", **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be {not next(iter(change.values()))}, got"):
        load_gpt2(tmp_path / "gpt2")


def test_rotary_positions_are_compared_in_every_layer(trained):
    layers = [StandardAttention, functools.partial(StandardAttention, rope=False)]
    with pytest.raises(ValueError, match="'s attention, but one with rope=True"):
        start_from(LanguageModule(layers, **SMALL), trained[1])
