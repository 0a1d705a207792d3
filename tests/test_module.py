"""LanguageModule: what it measures, how it optimises, and what a checkpoint gives back."""

import itertools
import math
import re
import shutil
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer

from bsbr_pl.attention import ARCHITECTURES, Attention, BSBRAttention, StandardAttention
from bsbr_pl.compiled import CompiledHidden
from bsbr_pl.metrics import StepLoss, TokenMetrics, token_nats
from bsbr_pl.module import LanguageModule

SMALL = {"vocab_size": 17, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}


def module_of(attention=BSBRAttention, **arguments) -> LanguageModule:
    torch.manual_seed(0)
    return LanguageModule(attention, **SMALL | arguments)


class Batches(torch.utils.data.Dataset):
    """A few fixed random sequences; each predicts its own next token."""

    def __init__(self, count: int = 4) -> None:
        self.ids = torch.randint(0, 17, (count, 25), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i, :-1], "targets": self.ids[i, 1:], "num_bytes": torch.tensor(30)}


def loader(count: int = 4) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Batches(count), batch_size=4)


def trainer(tmp_path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, enable_model_summary=False, **quiet | arguments)


def test_metrics_are_the_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 5, 7, generator=generator), torch.randint(0, 7, (3, 5), generator=generator)
    targets[0, 3:] = -100
    metrics = TokenMetrics()
    metrics.update(logits, targets, torch.tensor([9, 10, 11]))
    found = {name: float(value) for name, value in metrics.compute().items()}
    nats = [
        -float(logits[b, t].log_softmax(0)[targets[b, t]]) for b in range(3) for t in range(5) if targets[b, t] >= 0
    ]
    right = [bool(logits[b, t].argmax() == targets[b, t]) for b in range(3) for t in range(5) if targets[b, t] >= 0]
    assert len(nats) == 13
    assert found["loss"] == pytest.approx(sum(nats) / 13, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 13), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / 30, rel=1e-6)
    assert found["accuracy"] == sum(right) / 13


def test_metrics_do_not_depend_on_the_batches():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(8, 5, 7, generator=generator), torch.randint(0, 7, (8, 5), generator=generator)
    targets[2] = -100
    targets[5, 1:] = -100
    whole, parts = TokenMetrics(), TokenMetrics()
    whole.update(logits, targets, torch.arange(8))
    for rows in (slice(0, 1), slice(1, 6), slice(6, 8)):
        parts.update(logits[rows], targets[rows], torch.arange(8)[rows])
    for name, value in whole.compute().items():
        assert float(parts.compute()[name]) == pytest.approx(float(value), rel=1e-6), name


def test_no_bits_per_byte_without_bytes():
    metrics = TokenMetrics()
    metrics.update(torch.randn(1, 2, 3), torch.tensor([[0, 1]]))
    assert "bits_per_byte" not in metrics.compute()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns_one_batch_by_heart(name, tmp_path):
    module = module_of(ARCHITECTURES[name], learning_rate=0.02, warmup_steps=10, weight_decay=0.0)
    run = trainer(tmp_path, max_epochs=-1, max_steps=80)
    run.fit(module, loader())
    assert run.callback_metrics["train/loss"] < 0.1  # ln 17 = 2.83 to start with


@pytest.mark.filterwarnings("ignore")  # of torch itself, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(tmp_path):
    found = {}
    for compiled in (False, True):
        module = module_of(partial(StandardAttention, rope=False), num_layers=1, compile=compiled)
        used = []
        module.on_train_batch_end = lambda *_, module=module, used=used: used.append(module.compiled is not None)
        run = trainer(tmp_path, max_epochs=-1, max_steps=3)
        run.fit(module, loader())
        assert used == [compiled] * 3
        assert module.compiled is None  # from here on the model is used as it is
        found[compiled] = module.state_dict()
    for name, weight in found[False].items():
        torch.testing.assert_close(found[True][name], weight, rtol=1e-4, atol=1e-5)


def test_what_was_compiled_wrongly_is_not_trained(tmp_path, monkeypatch):
    def compiled_with(fault: float) -> None:
        monkeypatch.setattr(torch, "compile", lambda form: lambda *inputs: form(*inputs) * (1 + fault))
        trainer(tmp_path, max_epochs=-1, max_steps=2).fit(module_of(compile=True), loader())

    compiled_with(1e-6)
    with pytest.raises(RuntimeError, match=r"torch.compile gives .* another gradient .* set compile to false"):
        compiled_with(0.1)


class AsOnCuda(Callback):
    """Gives the module a compiled form, as `auto` does on CUDA only."""

    def __init__(self, form) -> None:
        self.form, self.used = form, []

    def on_train_start(self, trainer, module) -> None:
        module.compiled = CompiledHidden(module.model, self.form(module.model.hidden))

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.used.append(module.compiled is not None)


def failing(hidden):
    def compiled(input_ids):
        raise RuntimeError("no kernel\n  for this card")

    return compiled


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (failing, "no kernel for this card"),
        (lambda hidden: lambda input_ids: hidden(input_ids) * 1.1, "torch.compile gives .* another gradient"),
    ],
    ids=["raises", "wrong"],
)
def test_auto_goes_on_without_a_compiled_form_that_fails(form, reason, tmp_path):
    """One warning, and the weights are those of training that never compiled."""
    found = {}
    for compiled in (False, "auto"):
        module, seen = module_of(compile=compiled), AsOnCuda(form)
        run = trainer(tmp_path, max_epochs=-1, max_steps=3, callbacks=[seen] if compiled else [])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, loader())
        told = [str(w.message) for w in caught if "training goes on without torch.compile" in str(w.message)]
        found[compiled] = module.state_dict()
    assert len(told) == 1
    assert re.search(f"which failed: {reason}", told[0])
    assert seen.used == [False] * 3
    for name, weight in found[False].items():
        assert torch.equal(found["auto"][name], weight), name


def test_a_compiled_form_that_fails_is_an_error_where_it_was_asked_for(tmp_path):
    module = module_of(compile=True)
    with pytest.raises(RuntimeError, match="no kernel"):
        trainer(tmp_path, max_epochs=-1, max_steps=1, callbacks=[AsOnCuda(failing)]).fit(module, loader())


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler on a CPU, and there is no /nowhere/c\+\+"):
        trainer(tmp_path, max_steps=1).fit(module_of(compile=True), loader())


def test_training_loss_is_the_mean_over_counted_tokens(tmp_path):
    module = module_of()
    batch = next(iter(loader()))
    batch["targets"][0, 3:] = -100
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    counted = batch["targets"] >= 0
    nll = F.cross_entropy(module(batch["input_ids"]).transpose(1, 2), batch["targets"].clamp(min=0), reduction="none")
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(
        float(nll[counted].mean().detach()), rel=1e-5
    )


def test_only_matrices_decay_and_every_parameter_is_trained():
    module = module_of()
    module.trainer = Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    decayed, kept = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {id(p) for group in (decayed, kept) for p in group["params"]} == set(names)
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        "qkv", "out", "into", "chunk_query", "chunk_key"
    }  # fmt: skip


def test_only_the_first_step_after_a_resume_must_find_its_moments():
    module = module_of()
    names = dict(module.named_parameters())
    first = next(iter(names))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(module.parameters())
    module.restoring = True
    module.check_restored(optimizer)  # of a checkpoint before the first step
    optimizer.step()
    module.check_restored(optimizer)
    del optimizer.state[names[first]]
    with pytest.raises(ValueError, match=f"lacks {first}$"):
        module.check_restored(optimizer)
    module.restoring = False
    module.check_restored(optimizer)


def test_a_checkpoint_is_restored_once_a_batch_was_computed(tmp_path):
    """Errors until then are the checkpoint's."""
    module = module_of()
    for run in (trainer(tmp_path).validate, trainer(tmp_path, max_steps=1, limit_val_batches=0).fit):
        module.restoring = True
        run(module, loader())
        assert not module.restoring


def test_learning_rate_rises_then_falls_along_a_cosine():
    module = module_of(learning_rate=1.0, warmup_steps=4, min_learning_rate=0.1)
    module.trainer = Trainer(max_steps=14, logger=False, enable_checkpointing=False, accelerator="cpu")
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [0.25, 0.5, 0.75, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(11)]
    assert rates == pytest.approx(expected)
    assert configured["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize(
    "attention",
    [
        *ARCHITECTURES.values(),
        partial(BSBRAttention, chunk_size=4, retrieval_top_k=1),
        [partial(BSBRAttention, chunk_size=4), StandardAttention],
    ],
)
def test_a_checkpoint_gives_back_the_same_model(attention, tmp_path):
    module = module_of(attention, dropout=0.1)
    run = trainer(tmp_path, max_epochs=-1, max_steps=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    text = Batches().ids
    for again in (
        LanguageModule.load(tmp_path / "a.ckpt"),
        LanguageModule.load_from_checkpoint(tmp_path / "a.ckpt").eval(),
    ):
        assert [type(a) for a in again.model.attentions] == [type(a) for a in module.model.attentions]
        assert torch.equal(again(text), module.eval()(text))
        assert again.hparams == module.hparams


def test_numbers_from_numpy_can_be_loaded(tmp_path):
    attention = partial(ARCHITECTURES["hopfield"], beta=np.float64(0.5))
    module = module_of(attention, learning_rate=np.float64(0.01), dropout=np.float64(0.1))
    saved = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    torch.save(saved | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    assert LanguageModule.load(tmp_path / "a.ckpt").hparams == module.hparams


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "bad.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.ckpt is not a readable checkpoint"):
        LanguageModule.load(path)


class Hostile:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"hyper_parameters": SMALL, "state_dict": Hostile(tmp_path / "ran")}, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"hostile.ckpt is not a readable checkpoint"):
        LanguageModule.load(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("factory", [lambda d, h: StandardAttention(d, h), dict, 3])
def test_a_builder_that_cannot_be_stored_is_refused(factory):
    with pytest.raises(ValueError, match=r"attention must be an Attention class or a functools.partial of one"):
        module_of(factory)


def test_a_module_that_needs_other_arguments_is_refused():
    with pytest.raises(ValueError, match=r"Linear\(\) cannot be built: .*'in_features' and 'out_features'"):
        module_of(torch.nn.Linear)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"learning_rate": "1e-3"}, "learning_rate must be positive, got '1e-3'"),
        ({"min_learning_rate": 2}, "min_learning_rate must be a share from 0 to 1, got 2"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"warmup_steps": 2.5}, "warmup_steps must be 0 or more, got 2.5"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, got 1.0"),
        ({"beta2": math.inf}, "beta2 must be at least 0 and below 1, got inf"),
        ({"compile": "no"}, "compile must be true, false or auto, got 'no'"),
        ({"attention": {}}, "attention must be an Attention class or a functools.partial of one, got {}"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        module_of(**arguments)


def test_attention_is_the_contract():
    assert all(issubclass(cls, Attention) for cls in ARCHITECTURES.values())


def test_the_loss_of_bf16_logits_is_computed_in_fp32():
    random = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 50, 300, generator=random)).bfloat16()
    targets = torch.randint(300, (2, 50), generator=random)
    exact = logits.double()
    nats = exact.logsumexp(-1) - exact.gather(-1, targets[..., None])[..., 0]
    found = token_nats(logits, targets)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, nats, rtol=1e-5, atol=1e-5)


def test_a_step_is_the_mean_over_its_tokens():
    """Of three batches with 1, 4 and 3 counted tokens, the last step of an epoch that accumulates four."""
    targets = torch.full((3, 2, 4), -100)
    for batch, count in enumerate((1, 4, 3)):
        targets[batch].view(-1)[:count] = 0
    losses, step = (2.0, 3.0, 7.0), StepLoss()
    weighted = [float(step.weighted(torch.tensor(loss), y)) for loss, y in zip(losses, targets, strict=True)]
    mean = (1 * 2 + 4 * 3 + 3 * 7) / 8
    assert float(step.mean()) == pytest.approx(mean)
    assert sum(weighted) / 4 * float(step.correction(4)) == pytest.approx(mean), "Lightning divides by four"
    assert (step.samples, step.positions) == (6, 24)


def test_dropout_differs_between_seeds_processes_steps_and_batches():
    due: list[bool] = []

    def drawn(seed: int, rank: int, step: int, batch: int) -> tuple[float, ...]:
        module = module_of()
        module.dropout_seed, module.loop = seed, SimpleNamespace(validate_after_batch=due.append)
        module._trainer = SimpleNamespace(global_rank=rank, global_step=step)
        module.on_train_batch_start({}, batch)
        return tuple(torch.rand(3).tolist())

    keys = list(itertools.product((0, 1), repeat=4))
    with torch.random.fork_rng():
        found = [drawn(*key) for key in keys]
        assert len(set(found)) == 16
        assert [drawn(*key) for key in keys] == found
    assert due == [False] * 32, "no validation follows before the step says so"


class Gradients(Callback):
    """The gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.steps.append({name: p.grad.double().clone() for name, p in module.named_parameters()})


@pytest.mark.parametrize(
    ("limits", "batches", "rates"),
    [
        ({"max_epochs": -1, "max_steps": 3}, 1, [1 / 3, 2 / 3, 1.0]),  # warm-up longer than the run
        (
            {"max_epochs": 2},
            5,
            [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, *(0.1 + 0.45 * (1 + math.cos(math.pi * i / 5)) for i in range(1, 5))],
        ),
    ],
    ids=["steps", "epochs"],
)
def test_training_is_adamw_by_hand(tmp_path, limits, batches, rates):
    """Loshchilov and Hutter 2019, algorithm 2, with the gradients of the run and a learning rate a step, in fp64."""
    beta1, beta2, decay, top = 0.6, 0.9, 0.5, 0.01
    module = module_of(
        learning_rate=top, min_learning_rate=0.1, warmup_steps=5, weight_decay=decay, beta1=beta1, beta2=beta2
    )
    matrices = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    weights = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    seen = Gradients()
    trainer(tmp_path, callbacks=[seen], **limits).fit(module, loader(4 * batches))
    assert len(seen.steps) == len(rates)
    assert all(group["betas"] == (beta1, beta2) for group in module.configure_optimizers()["optimizer"].param_groups)
    for name, w in weights.items():
        m = v = torch.zeros_like(w)
        for t, (gradients, share) in enumerate(zip(seen.steps, rates, strict=True), 1):
            g = gradients[name]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
            w = w - top * share * (update + (decay * w if name in matrices else 0))
        torch.testing.assert_close(module.state_dict()[name].double(), w, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_of_single_samples_is_not_cut():
    module, within = module_of(), []
    module.loop = SimpleNamespace(end_batch=lambda within_step: within.append(within_step))
    module._step_loss.weighted(torch.tensor(1.0), torch.zeros(1, 4, dtype=torch.long))
    module.on_train_batch_end(None, {}, 0)
    module._step_loss = StepLoss()
    module.on_train_batch_end(None, {}, 1)
    assert within == [True, False]


def test_a_refused_resume_names_both_values(monkeypatch):
    module = module_of()
    module._stage = "fit"
    precision = SimpleNamespace(convert_module=lambda module: module)
    module._trainer = SimpleNamespace(precision_plugin=precision)
    monkeypatch.setattr(module, "_arguments", lambda: {"model.hidden_dim": 32, "model.learning_rate": 0.1})
    run = {"arguments": {"model.hidden_dim": 16, "model.learning_rate": 0.2}, "changes": [], "step": 3}
    run |= {"tokens": 96, "samples": 3, "validated": None}
    with pytest.raises(ValueError, match=r"cannot be resumed with model.hidden_dim=32 instead of 16: "):
        module.on_load_checkpoint({"run": run | {"epoch_steps": None}, "global_step": 3})
