"""Certificates of modules that are no LanguageModel: causal ones pass, and each kind of leak is found and named."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bsbr_pl
from bsbr_pl import __main__ as command_line
from bsbr_pl.attention import BSBRAttention, StandardAttention
from bsbr_pl.evals import certificate as certificates
from bsbr_pl.evals.certificate import _useful, certify
from bsbr_pl.evals.measurement import Measurement
from bsbr_pl.evals.probes import probe
from bsbr_pl.foreign import SHARED
from bsbr_pl.model import LanguageModel
from bsbr_pl.spec import AttentionSpec

CUTS = {f"suffix_{cut}" for cut in (0, 1, 31, 32, 33, 63, 64, 65, 255)}


@pytest.fixture(autouse=True)
def _start(one_thread):
    torch.manual_seed(0)


def failing(certificate) -> set[str]:
    return {check.name for check in certificate.checks if check.required and not check.passed}


class MaskedAttention(nn.Module):
    """torch's own attention, with or without its causal mask."""

    def __init__(self, dim: int, heads: int, masked: bool = True) -> None:
        super().__init__()
        self.attention, self.masked = nn.MultiheadAttention(dim, heads, batch_first=True), masked

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1) if self.masked else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Lookup(nn.Module):
    """Looks for a size that nobody gives."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.map = nn.Linear(sizes["dim"], sizes["dim"])


class Conv(nn.Module):
    """A short convolution, padded on the left or on both sides."""

    def __init__(self, dim: int, left: int, right: int) -> None:
        super().__init__()
        self.conv, self.padding = nn.Conv1d(dim, dim, 3), (left, right)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.mT, self.padding)).mT


class BatchNorm(nn.Module):
    """Statistics over batch and time in training, running ones in evaluation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class ChunkMean(nn.Module):
    """Adds the mean of the own chunk, or of the chunk before it."""

    def __init__(self, size: int, own: bool) -> None:
        super().__init__()
        self.size, self.before = size, int(not own)

    def forward(self, x: Tensor) -> Tensor:
        chunks = torch.arange(x.shape[1]) // self.size
        seen = (chunks[:, None] - self.before == chunks).to(x)
        return x + seen @ x / seen.sum(1, keepdim=True).clamp(min=1)


class SelectiveScan(nn.Module):
    """As Mamba: h_t = exp(-d_t a) h_{t-1} + d_t b_t x_t, y_t = c_t . h_t; d, b, c follow from x (arXiv 2312.00752)."""

    def __init__(self, d_model: int, states: int = 4) -> None:
        super().__init__()
        self.into = nn.Linear(d_model, 2 * d_model)
        self.conv = Conv(d_model, 2, 0)
        self.d, self.b, self.c = (nn.Linear(d_model, n) for n in (d_model, states, states))
        self.log_a = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(d_model, 1))
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.into(x).chunk(2, -1)
        x = F.silu(self.conv(x))
        d, b, c = F.softplus(self.d(x))[..., None], self.b(x), self.c(x)
        decay = torch.exp(-d * self.log_a.exp())  # (B, T, D, N)
        write = d * b[:, :, None] * x[..., None]
        h, outputs = torch.zeros_like(write[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + write[:, t]
            outputs.append((h * c[:, t, None]).sum(-1))
        return self.out(torch.stack(outputs, 1) * F.silu(gate))


class Rounds(nn.Module):
    """The mean of the tokens so far, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float().cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]).to(x)


class Convolved(nn.Module):
    """The mean of the tokens so far, by a Fourier transform: every output has a rounding error of every input."""

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        ones = torch.fft.rfft(torch.ones(T, 1, dtype=x.dtype), 2 * T, 0)
        sums = torch.fft.irfft(torch.fft.rfft(x, 2 * T, 1) * ones, 2 * T, 1)[:, :T]
        return sums / torch.arange(1, T + 1)[:, None]


CAUSAL = {
    "attention": lambda: MaskedAttention(16, 2),
    "convolution": lambda: Conv(16, 2, 0),
    "chunk mean": lambda: ChunkMean(32, own=False),
    "scan": lambda: SelectiveScan(16),
    "rounds": Rounds,
    "transform": Convolved,
    "dropout": lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.LayerNorm(16)),
    "nothing": nn.Identity,
}


class SeesOneToken(nn.Module):
    """One token sees the next one, at a position that is no edge of a usual chunk; with gate=0 only after training."""

    def __init__(self, at: int, gate: float = 1.0, period: int = 1 << 20, rows: int = 1 << 20) -> None:
        super().__init__()
        self.at, self.period, self.rows, self.gate = at, period, rows, nn.Parameter(torch.tensor(gate))
        self.start = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.rows:
            raise ValueError("too many texts")
        later = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)
        place = torch.arange(x.shape[1])
        leaks = (place % self.period == self.at) & (place >= self.start)
        return x + self.gate * leaks[:, None] * later


@pytest.mark.parametrize(
    ("module", "token"),
    [
        (SeesOneToken(17), 17),
        (SeesOneToken(129), 129),
        (SeesOneToken(47, period=48), 47),  # the last token of a chunk of 48
        (SeesOneToken(17, gate=0.0), 17),
        (SeesOneToken(40, rows=4), 40),  # computes few texts at once
        (nn.Sequential(nn.Linear(16, 16), SeesOneToken(99)), 99),
    ],
)
def test_a_leak_at_any_of_the_first_tokens_is_found(module, token):
    """Where no other check looks."""
    certificate = certify(module, hidden_dim=16, quiet=True)
    assert failing(certificate) == {"every_suffix"}
    assert certificate.first_leak == token


def test_later_tokens_are_cut_where_the_seed_says():
    """Each fourth of them leaks, and 16 of 124 are cut; of a shorter text, all are."""
    module = SeesOneToken(3, period=4).double()
    module.start = 131
    found = [Measurement(probe(module, 2), [0], 256, seed).every_suffix().token for seed in range(8)]
    assert all(token % 4 == 3 and 131 <= token < 255 for token in found)
    assert len(set(found)) > 1
    module.start = 139
    assert Measurement(probe(module, 2), [0], 141, 0).every_suffix().token == 139


CHANGES = {
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "the default device": lambda: torch.set_default_device("meta"),
    "whether gradients are computed": lambda: torch.set_grad_enabled(False),
    "the precision of products": lambda: torch.set_float32_matmul_precision("medium"),
    "whether algorithms are deterministic": lambda: torch.use_deterministic_algorithms(True),
}


class Changes(nn.Module):
    """Changes what all models of a process share: the others would be timed and trained in another way."""

    def __init__(self, dim: int, what: str, when_built: bool) -> None:
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.ones(dim)), "" if when_built else what
        if when_built:
            CHANGES[what]()

    def forward(self, x: Tensor) -> Tensor:
        if self.what:
            CHANGES[self.what]()
        return x * self.weight


@pytest.mark.parametrize(
    ("what", "when_built"),
    [*((what, True) for what in CHANGES), *((what, False) for what in CHANGES if "gradients" not in what)],
)
def test_what_changes_the_process_is_refused_and_put_back(what, when_built):
    before = {name: get() for name, (_, get) in SHARED.items()}
    with pytest.raises(ValueError, match=f"Changes changes {what} of the whole process, which was "):  # noqa: PT012
        built = AttentionSpec(Changes, {"what": what, "when_built": when_built})(4, 1)
        certify(built.module, 4, length=9, quiet=True)
    assert {name: get() for name, (_, get) in SHARED.items()} == before
    assert not torch.overrides._get_current_function_mode_stack(), "a mode would slow every call"


def test_what_tells_its_edges_is_not_cut_everywhere():
    own = certify(BSBRAttention(16, 2, chunk_size=8), hidden_dim=16, quiet=True)
    assert "every_suffix" not in {check.name for check in own.checks}
    layers = [StandardAttention, AttentionSpec.of(MaskedAttention)]
    model = LanguageModel(layers, 11, 16, num_layers=2, num_heads=2, ff_dim=0)
    assert "every_suffix" in {check.name for check in certify(model, length=9, quiet=True).checks}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_module_passes(name, capsys):
    certificate = bsbr_pl.certify(CAUSAL[name](), hidden_dim=16, length=70 if name == "scan" else None)
    assert certificate.passed, certificate
    assert certificate.first_leak is None
    names = {check.name for check in certificate.checks}
    others = {"future_gradient", "training_suffix", "repeat", "batch", "padding", "length_1", "length_37", "bf16"}
    assert others <= names
    if name != "scan":
        assert {one for one in names if one.startswith("suffix")} == CUTS
    limits = {check.name: check.limit for check in certificate.checks}
    assert limits["suffix_0"] == (1e-5 if name == "rounds" else 1e-8)
    assert limits["future_gradient"] == (1e-5 if name == "rounds" else 1e-12)
    assert {check.name for check in certificate.checks if not check.passed} <= {"bf16"}
    assert str(certificate) == capsys.readouterr().out.rstrip("\n")


LEAKS = {
    "mask forgotten": (lambda: MaskedAttention(16, 2, masked=False), 0, CUTS | {"future_gradient", "training_suffix"}),
    "padded on both sides": (lambda: Conv(16, 1, 1), 0, CUTS | {"future_gradient", "training_suffix"}),
    "batch norm": (lambda: BatchNorm(16), 0, {"training_suffix"}),
    "own chunk": (lambda: ChunkMean(32, own=True), 0, {"suffix_0", "suffix_1", "suffix_32", "suffix_33", "suffix_64"}),
}


@pytest.mark.parametrize("name", LEAKS)
def test_each_kind_of_leak_is_found_and_named(name):
    make, token, expected = LEAKS[name]
    certificate = certify(make(), 16, quiet=True)
    assert not certificate.passed
    assert expected <= failing(certificate)
    assert certificate.first_leak == token
    assert str(certificate).endswith(f"256 tokens: FAILED; token {token} is the first that saw the future")
    assert not {"suffix_31", "suffix_63"} & failing(certificate) or name != "own chunk", "there a chunk ends"
    if name == "batch norm":
        of_training = {"training_suffix", "context_1024", "precision"}
        assert failing(certificate) == of_training, "in evaluation it uses running statistics"


class From100(nn.Module):
    """Sees one token ahead from token 100 on."""

    def forward(self, x: Tensor) -> Tensor:
        ahead = torch.cat((x[:, 1:], x[:, :1] * 0), 1)
        return torch.cat((x[:, :100], ahead[:, 100:]), 1)


def test_the_first_token_is_counted_from_what_changed():
    certificate = certify(From100(), 16, length=181, quiet=True)
    assert certificate.first_leak == 100
    assert failing(certificate) >= {"suffix_180", "length_101"}


def test_what_is_drawn_and_what_a_batch_shares_is_found():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-3 * torch.rand_like(x)

    class Shares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(0, keepdim=True)

    assert "repeat" in failing(certify(Noise(), 4, length=20, quiet=True))
    assert failing(certify(Shares(), 4, length=20, quiet=True)) == {"batch"}


def test_what_a_module_refuses_is_said_and_disqualifies_it_not():
    class Multiples(MaskedAttention):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] % 8:
                raise RuntimeError("lengths are multiples of 8")
            return super().forward(x)

    certificate = certify(Multiples(16, 2), 16, quiet=True)
    assert certificate.passed
    by_name = {check.name: check for check in certificate.checks}
    assert math.isnan(by_name["length_37"].measured)
    assert str(by_name["length_37"]) == "no: RuntimeError: lengths are multiples of 8"
    assert str(by_name["suffix_255"]) == "no: RuntimeError: lengths are multiples of 8", "it reads 257 tokens"
    assert failing(certify(Multiples(16, 2, masked=False), 16, quiet=True)) >= {"suffix_0", "training_suffix"}


@pytest.mark.parametrize("leak", [MaskedAttention, Conv])
def test_a_gate_at_zero_hides_nothing(leak):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leak = leak(16, 2, False) if leak is MaskedAttention else leak(16, 1, 1)
            self.gate = nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.leak(x)

    certificate = certify(Gated(), 16, quiet=True)
    assert {"suffix_0", "future_gradient"} <= failing(certificate)
    assert certificate.noise == 0.25


def test_noise_that_breaks_a_module_is_left_out():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((64,), 1e-3))

        def forward(self, x: Tensor) -> Tensor:
            return x[..., :1] * self.scale.sqrt()

    certificate = certify(Root(), 64, quiet=True)
    assert certificate.passed
    assert certificate.noise == 0


@pytest.mark.parametrize("attention", [StandardAttention(16, 2), BSBRAttention(16, 2, chunk_size=8)])
def test_an_attention_decodes_too(attention):
    certificate = certify(attention, 16, quiet=True)
    assert certificate.passed, certificate
    assert certificate.length == (131 if attention.period == 1 else 19)
    assert {"decode_step", "decode_prefill", "continue"} <= {check.name for check in certificate.checks}


class Model(nn.Module):
    """ids (B, T) -> logits (B, T, V), by a causal or a leaking mixer."""

    vocab_size = 11

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(self.vocab_size, 16), MaskedAttention(16, 2, masked)
        self.head = nn.Linear(16, self.vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mixer(self.embedding(ids)))


def test_a_language_model_reads_ids():
    certificate = certify(Model(), quiet=True)
    assert certificate.passed
    assert certificate.length == 131
    names = {check.name for check in certificate.checks}
    assert {"random_tokens", "suffix_31", "suffix_130", "future_gradient"} <= names
    leaky = certify(Model(masked=False), quiet=True)
    assert {"suffix_0", "future_gradient", "training_suffix"} <= failing(leaky)
    assert leaky.first_leak == 0


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (nn.Linear(4, 4), {}, "give hidden_dim if Linear maps .* or vocab_size if it reads ids"),
        (nn.Linear(4, 4), {"vocab_size": 5}, "Linear has no nn.Embedding for vocab_size=5 ids"),
        (nn.Linear(4, 4), {"hidden_dim": 5}, r"Linear cannot compute inputs of shape \(1, 256, 5\): mat1"),
        (nn.Flatten(), {"hidden_dim": 5}, r"Flatten must give an output for each token .*, got shape \(1, 1280\)"),
        (
            nn.Linear(8, 4),
            {"hidden_dim": 8},
            r"Linear must map \(B, T, D\) to .*, got \(1, 256, 4\) for \(1, 256, 8\)",
        ),
        (nn.GRU(5, 5, batch_first=True), {"hidden_dim": 5, "length": 0}, "length must be"),
        (nn.MultiheadAttention(4, 1), {"hidden_dim": 4}, "MultiheadAttention.forward must take one tensor"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(module, arguments, words):
    with pytest.raises(ValueError, match=words):
        certify(module, **arguments)


def test_a_module_that_cannot_be_copied():
    module = nn.Linear(4, 4)
    module.last = module(torch.ones(1, 4))
    with pytest.raises(ValueError, match="Linear keeps tensors of its last computation, so it cannot be copied"):
        certify(module, 4)


def test_the_shell(capsys):
    here = f"{__name__}:"
    sizes = ["--hidden_dim=16", "--num_heads=2", "--length=40"]
    assert command_line.main(["certify", f"{here}MaskedAttention", *sizes]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"importing {__name__}, as you named it")
    assert captured.out.endswith("MaskedAttention, 40 tokens: passed\n")
    assert command_line.main(["certify", f"{here}MaskedAttention", *sizes, "--options.masked=false"]) == 1
    assert capsys.readouterr().out.endswith("FAILED; token 0 is the first that saw the future\n")
    assert command_line.main(["certify", f"{here}Model"]) == 0
    for name, words in {
        f"{here}Nope": "has no attribute 'Nope'",
        f"{here}CUTS": "names no class or function",
        f"{here}Lookup": "Lookup() cannot be built: KeyError: 'dim'",
    }.items():
        with pytest.raises(SystemExit) as end:
            command_line.main(
                ["certify", name, *[size for size in sizes if name.startswith(here) or "heads" not in size]]
            )
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["certify", f"{here}MaskedAttention", "--hidden_dim=16"])
    assert "'heads'; give it num_heads, or other init_args (options)\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["certify", f"{here}MaskedAttention", *sizes, "--options=[3]"])
    assert "error: options=[3]: must be options like {name: 1}\n" in capsys.readouterr().err


def test_compilation_is_checked_where_it_is_asked_for_and_bounded(monkeypatch):
    linear = nn.Linear(4, 4)
    assert "compile" not in {check.name for check in certify(linear, 4, length=9, quiet=True).checks}
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    (check,) = [c for c in certify(linear, 4, length=9, compile=True, quiet=True).checks if c.name == "compile"]
    assert "no-compiler-of-this-name" in str(check)
    assert not check.required

    with pytest.raises(TimeoutError, match="takes more than 1 s"), certificates._time_limit(1):
        threading.Event().wait(5)


def test_a_compiled_module_is_compared():
    (check,) = [
        c for c in certify(nn.Linear(4, 4), 4, length=9, compile=True, quiet=True).checks if c.name == "compile"
    ]
    assert check.passed, check


def test_hugging_face_models_are_decoded_with_their_cache():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, intermediate_size=64)
    mamba = transformers.Mamba2Config(**sizes, num_heads=4, head_dim=16, state_size=16, n_groups=1, chunk_size=16)
    for model in (transformers.LlamaForCausalLM(config), transformers.Mamba2ForCausalLM(mamba)):
        certificate = certify(model, quiet=True)
        assert certificate.passed, certificate
        by_name = {check.name: check for check in certificate.checks}
        assert by_name["decode_step"].passed
        assert by_name["decode_prefill"].passed
        assert by_name["suffix_0"].limit == 1e-5, "their norms round to float32"


def test_a_useful_check_that_fails_disqualifies_nobody():
    check = _useful("bf16", 0.5, lambda own, run: 0.75, None, None)
    assert (check.passed, check.required) == (False, False)
