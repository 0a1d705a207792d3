"""Exported models in Hugging Face's transformers: equal logits, decoding and ids, and no code in a folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_hub import local_hub
from safetensors.torch import load_file, save_file

from bsbr_pl.__main__ import main
from bsbr_pl.attention import ARCHITECTURES, BSBRAttention, StandardAttention
from bsbr_pl.convert import load_gpt2
from bsbr_pl.data import InductionData, TextData
from bsbr_pl.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, train_bpe
from bsbr_pl.models import SIZES
from bsbr_pl.module import LanguageModule

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bsbr_pl import hf

T = 21  # tokens of a prompt: two chunks of 8, and a part of one
IDS = torch.randint(256, (3, T + 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    """All models here are tiny."""


def stirred(module: LanguageModule) -> LanguageModule:
    """With noise in every parameter, so that a gate at zero hides nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def exported(module: LanguageModule, folder: Path, tokenizer: Tokenizer | None = None):
    """The module as a stranger reads it."""
    hf.export(module.model, module.hparams, tokenizer, folder)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_states_and_generation_are_ours(name, make_module, tmp_path):
    module = stirred(make_module(name))
    model = exported(module, tmp_path)
    ours = module(IDS)
    assert ours.std() > 0.3
    torch.testing.assert_close(model(IDS).logits, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, ours, rtol=0, atol=1e-6)

    prompt = model(IDS[:, :T], logits_to_keep=1)
    torch.testing.assert_close(prompt.logits, ours[:, T - 1 : T], rtol=0, atol=1e-6)
    assert prompt.cache.get_seq_length() == T
    rest = model(IDS[:, T:], cache=prompt.cache)  # several tokens from a state, twice from the same state
    torch.testing.assert_close(rest.logits, ours[:, T:], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(IDS[:, T:], cache=prompt.cache).logits, rest.logits)
    assert rest.cache.get_seq_length() == IDS.shape[1]

    greedy = module.model.generate(IDS[:, :T], 30, temperature=0)
    mask = torch.ones_like(IDS[:, :T])
    assert torch.equal(model.generate(IDS[:, :T], attention_mask=mask, max_new_tokens=30, do_sample=False), greedy)


@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "bsbr", "mamba2"])
def test_beams_continue_their_own_states(name, make_module, tmp_path):
    model = exported(stirred(make_module(name)), tmp_path)
    options = {"attention_mask": torch.ones(3, T), "max_new_tokens": 12, "num_beams": 4, "do_sample": False}
    found = model.generate(IDS[:, :T], **options)
    assert torch.equal(found, model.generate(IDS[:, :T], **options, use_cache=False))
    assert not torch.equal(found, model.generate(IDS[:, :T], **options | {"num_beams": 1}))


MODELS = {
    "hybrid": {"attention": ["gated_delta_net", "standard"], "ff_dim": 24},
    "options": {"attention": partial(BSBRAttention, chunk_size=4, retrieval_top_k=1, conv_size=1, overlap=False)},
    "out": {"attention": partial(StandardAttention, bias=True), "ff_bias": True, "ff_activation": "gelu"},
    "sizes": {
        "attention": partial(StandardAttention, num_kv_heads=1, sink=True, output_gate=True),
        **{"ff_activation": "swiglu", "norm": "rms", "tie_embeddings": False, "bottleneck": True},
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_all_arguments_are_exported(name, tmp_path):
    module = stirred(LanguageModule(vocab_size=257, hidden_dim=16, num_layers=2, num_heads=2, **MODELS[name]))
    model = exported(module, tmp_path)
    torch.testing.assert_close(model(IDS).logits, module(IDS), rtol=0, atol=1e-6)
    again = LanguageModule(attention=list(model.config.specs), **model.config.sizes)
    assert {size.name for size in SIZES} == model.config.sizes.keys()
    assert {k: again.hparams[k] for k in model.config.sizes} == {k: module.hparams[k] for k in model.config.sizes}
    tied = module.hparams["tie_embeddings"]
    assert model.config.tie_word_embeddings is tied
    assert (model.get_output_embeddings() is None) is tied
    model.resize_token_embeddings(260)
    assert model(IDS).logits.shape[-1] == 260


@torch.no_grad()
def test_gpt2_comes_in_and_leaves(tmp_path):
    gpt2 = load_gpt2(Path(__file__).parent / "data_files" / "gpt2").eval()
    model = exported(gpt2, tmp_path)
    ids = IDS[:, :T] % gpt2.hparams["vocab_size"]
    assert model.config.positions == 48
    torch.testing.assert_close(model(ids).logits, gpt2(ids), rtol=0, atol=1e-6)


def test_the_loss_and_its_gradients_are_ours(make_module, tmp_path):
    module = stirred(make_module("bsbr"))
    model = exported(module, tmp_path).train()
    loss = model(IDS, labels=IDS).loss
    expected = torch.nn.functional.cross_entropy(module(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(module.model.parameters(), model.model.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad)
    assert model(IDS).cache is None


@torch.no_grad()
def test_padding_is_on_the_right_or_refused(make_module, tmp_path):
    model = exported(stirred(make_module("bsbr")), tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, -5:] = 0
    torch.testing.assert_close(model(IDS, mask).logits[1, :-5], model(IDS[1:2, :-5]).logits[0], rtol=0, atol=1e-5)
    for refused in (mask.flip(1), torch.cat((mask, mask), 1)):
        with pytest.raises(ValueError, match=r"^attention_mask pads before a token: pad on the right, or give prompts"):
            model(IDS, refused)
    with pytest.raises(ValueError, match=r"^cache must be what an earlier call returned, got a DynamicCache$"):
        model(IDS, cache=DynamicCache())


# Tokenizers.

LESSON = [f"{i} self naïve 日本語 if x:\n        pass\n <|endoftext|> {i * i}" for i in range(50)]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["", "<|endoftext|>", "a<|pad|>b</s>", "  \n\t\r\n ", " , . n't", "\x00\x7f", "é" * 50, "        return x\n\n\n"]
)


def foreign(ends: list[str], place: int) -> BPETokenizer:
    """A tokenizer.json with special tokens whose ids begin at `place`, and a prefix that transformers would add."""
    table = json.loads(train_bpe(LESSON, 300))
    vocabulary = table["model"]["vocab"]
    for token, i in vocabulary.items():
        vocabulary[token] = i + len(ends) * (i >= place)
    table["added_tokens"] = [{"id": place + i, "content": name, "special": True} for i, name in enumerate(ends)]
    return BPETokenizer(json.dumps(table))


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: BPETokenizer(train_bpe(LESSON, 300)),
    "special tokens in the middle": lambda: foreign(["<|pad|>", "</s>", "<|user|>"], 120),
    "special tokens at the end": lambda: foreign(["<|pad|>", "<|endoftext|>", "<|user|>"], 299),
    "special tokens without an end of text": lambda: foreign(["<|pad|>"], 299),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_has_the_same_ids(name, tmp_path):
    ours = TOKENIZERS[name]()
    hf.hugging_face_tokenizer(ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.eos_id

    @given(text=TEXTS)
    def same(text):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode([*ids, ours.eos_id], skip_special_tokens=True) == text
        assert theirs.batch_decode([ids]) == [text]

    same()
    every = [i for i in range(ours.vocab_size) if ours.token_bytes[i]]
    assert theirs.batch_decode([[i] for i in every]) == [ours.decode([i]) for i in every]


# A folder of somebody else.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_module) -> Path:
    path = tmp_path_factory.mktemp("exported") / "bsbr"
    exported(make_module("bsbr"), path, ByteTokenizer())
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def change(folder: Path, name: str = "config.json", **values) -> None:
    table = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(table | values))


def test_a_folder_holds_no_code(folder):
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer_config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["attention"] == [{"name": "bsbr", "options": {"chunk_size": 8}}]
    assert "auto_map" not in config
    (example,) = (folder / "README.md").read_text().split("```python\n")[1:]
    exec(example.split("```")[0].replace("FOLDER OR NAME", str(folder)), {})


def test_code_in_a_folder_is_not_run(copy):
    for name, kind in (("evil.py", "class Evil:\n    pass\n"), ("modeling_bsbr_pl.py", "")):
        (copy / name).write_text(f"from pathlib import Path\nPath({str(copy / 'ran')!r}).touch()\n{kind}")
    change(copy, auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil"))
    change(copy, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    change(copy, attn_implementation="owner/kernel", quantization_config={"quant_method": "evil"}, custom_pipelines={})
    model = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=False)
    assert AutoTokenizer.from_pretrained(copy, trust_remote_code=False)("é")["input_ids"] == [195, 169]
    assert not hasattr(model.config, "quantization_config")
    assert not (copy / "ran").exists()


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def without(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.other"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


HUGE = 10**9
FOREIGN = {
    "a class by its path": ({"attention": [{"name": "os.system", "options": {}}]}, r"must be one of standard, .*'os.s"),
    "no list": ({"attention": "bsbr"}, "attention must be a list of names with options, got 'bsbr'"),
    "more in an entry": ({"attention": [{"name": "bsbr", "options": {}, "code": ""}]}, "attention must list"),
    "unknown option": ({"attention": [{"name": "bsbr", "options": {"x": 1}}]}, "has no argument 'x'"),
    "too wide": ({"hidden_dim": HUGE}, f"hidden_dim={HUGE} is too large"),
    "too deep": ({"num_layers": HUGE}, f"num_layers={HUGE} is too large"),
    "too many ids": ({"vocab_size": HUGE * 1000}, "is too large"),
    "another size": ({"ff_dim": 63}, "ignore_mismatched_sizes"),
    "another depth": ({"num_layers": 3}, "the weights are not those of config.json: missing keys"),
    "pickled weights": (pickled, "safetensors"),
    "another tensor": (without, "the weights are not those of config.json: missing keys .*model.norm.weight"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_hostile_folder_is_refused(name, copy):
    changes, words = FOREIGN[name]
    if callable(changes):
        changes(copy)
    else:
        change(copy, **changes)
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=False)


# The command.


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_export_of_a_checkpoint(tokenizer, make_trainer, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = TextData(str(texts), tokenizer, 300, context_length=32, batch_size=4, cache_dir="cache")
    data.prepare_data()
    module = LanguageModule("bsbr", data.vocab_size, hidden_dim=16, num_layers=2, num_heads=2)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint("trained.ckpt")
    assert main(["export", "trained.ckpt", "exported", f"--data.source={texts}", "--data.cache_dir=cache"]) == 0
    assert capsys.readouterr().out == "exported\n"
    model = AutoModelForCausalLM.from_pretrained("exported")
    theirs = AutoTokenizer.from_pretrained("exported")
    text = "line 3 of 4, the same as 5\n"
    batch = theirs([text, text], return_tensors="pt")
    assert batch["input_ids"].tolist() == [data.tokenizer.encode(text)] * 2
    found = model.generate(**batch, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, module.model.generate(batch["input_ids"], 9, temperature=0)[:, : found.shape[1]])
    assert model.generation_config.eos_token_id == data.tokenizer.eos_id


def test_the_page_runs(make_trainer, make_data, make_module, tmp_path, monkeypatch, capsys):
    """With a checkpoint of this test; the upload goes to a Hub on this machine."""
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(make_module("bsbr"), datamodule=make_data())
    trainer.save_checkpoint("runs/version_0/checkpoints/best.ckpt")
    page = (Path(__file__).parent.parent / "docs" / "howto" / "hugging_face.md").read_text()
    (command,) = re.findall("^bsbr (.*)$", page, re.M)
    assert main(shlex.split(command)) == 0
    use, upload = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(use, names)
    assert capsys.readouterr().out.startswith("exported\ndef f(")
    assert {path.name for path in Path("exported").iterdir()} == set(re.findall(r"`(\w+\.\w+)`(?=.* \| )", page))
    ours = names["model"](IDS).logits
    with local_hub(tmp_path / "hub") as address:
        keys = ("PATH", "HOME", "PYTHONPATH", "OMP_NUM_THREADS")
        online = {key: os.environ[key] for key in keys if key in os.environ} | {"HF_ENDPOINT": address, "HF_TOKEN": "x"}
        subprocess.run([sys.executable, "-c", use + upload], check=True, env=online)
    model = AutoModelForCausalLM.from_pretrained("hub/you/model", trust_remote_code=False)
    assert torch.equal(model(IDS).logits, ours)
    assert AutoTokenizer.from_pretrained("hub/you/model")("é")["input_ids"] == [195, 169]


def test_a_model_of_a_recall_task_has_no_tokenizer(make_trainer, tmp_path, capsys):
    data = InductionData(16, num_train=8, num_test=4, context_length=16, batch_size=4)
    module = LanguageModule("linear", data.vocab_size, hidden_dim=16, num_layers=1, num_heads=2)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert main(["export", str(tmp_path / "trained.ckpt"), str(tmp_path / "exported")]) == 0
    assert capsys.readouterr().out.endswith("exported (without a tokenizer: the model was not trained on text)\n")
    assert not (tmp_path / "exported" / "tokenizer.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.eos_token_id is None


class OwnAttention(StandardAttention):
    """Not registered."""


def test_an_architecture_must_be_registered(tmp_path, monkeypatch):
    module = LanguageModule(OwnAttention, 257, hidden_dim=16, num_layers=1, num_heads=2).eval()
    with pytest.raises(ValueError, match=r"^.*OwnAttention cannot be exported: a folder names architectures by their"):
        hf.export(module.model, module.hparams, None, tmp_path)
    monkeypatch.setitem(ARCHITECTURES, "own", OwnAttention)
    assert isinstance(exported(module, tmp_path).model.attentions[0], OwnAttention)
