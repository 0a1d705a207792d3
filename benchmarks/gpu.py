"""Every architecture on one CUDA card: the law, the operation, the training step, a decoded token.

    python benchmarks/gpu.py --seconds 480            # measure what is missing, most important rows first
    python benchmarks/gpu.py --table                  # the rows so far as Markdown
    python benchmarks/gpu.py --dry-run                # every row at toy size on a CPU; into a temporary file

Each row is a line of benchmarks/results/gpu.jsonl, written when it is measured and skipped when it is there for that
card, so that several short leases add up to one table. A row that fails writes its error and the rest goes on. Compiled
forms are first compiled in parallel processes, one for each core, for at most `--warm-seconds`.

The operation is what `benchmarks/operation.py` times (without projections, convolutions and rotary positions), forward
and backward, one sequence, bf16. "device" is the time of a CUDA graph's replay, "launched" that of the same calls from
Python. The training step is that of `bf16-mixed`: hidden 768, 12 layers, 12 heads, 16,384 ids, AdamW, clipping.
"""

import contextlib
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, parser
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES, kernels
from bsbr_pl.attention.parts import at_least_fp32
from bsbr_pl.compiled import compile_hidden
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.records import git_commit
from bsbr_pl.values import one_line

CACHE = "/tmp/bsbr_pl-gpu-cache"
WINDOW = 128
MODEL = {"vocab_size": 16_384, "hidden_dim": 768, "num_layers": 12, "num_heads": 12}
TOY_MODEL = {"vocab_size": 64, "hidden_dim": 32, "num_layers": 2, "num_heads": 2}
BATCHES = {4096: 8, 16_384: 2, 32_768: 1}  # sequences of a training step, by tokens
LAW = {"bfloat16": 8e-3, "float32": 1e-5}
FLA = ("linear", "delta_net")  # last: their tuning takes longer than all the rest
EFFICIENT = ("sliding_window", "bsbr", "linear", "gau", "delta_net", "gated_delta_net")


@dataclass(frozen=True)
class Row:
    kind: str  # peak, law, operation, step, decode
    name: str
    tokens: int = 0
    heads: int = 0
    width: int = 0
    dtype: str = "bfloat16"
    form: str = "eager"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name} {self.tokens} {self.heads}x{self.width} {self.dtype} {self.form}"


def rows() -> list[Row]:
    """Most important first."""
    sdpa = {"sdpa": "eager", "sliding_window": "eager"}
    forms = sdpa | dict.fromkeys(("bsbr", "linear", "gau", "delta_net", "gated_delta_net"), "compiled")

    def operations(tokens: int, width: int = 64) -> list[Row]:
        return [Row("operation", name, tokens, 16, width, form=form) for name, form in forms.items()]

    def steps(tokens: int, names: tuple[str, ...], form: str = "compiled") -> list[Row]:
        return [Row("step", name, tokens, form=form) for name in names]

    def law(dtype: str, form: str) -> list[Row]:
        return [Row("law", name, 300, 2, 64, dtype, form) for name in (*EFFICIENT, "standard", "hopfield")]

    return [
        *(Row("peak", name) for name in ("matrix product", "copy")),
        *operations(16_384),
        *law("bfloat16", "eager"),
        *steps(4096, ("standard", *EFFICIENT)),
        *operations(65_536),
        *steps(16_384, ("standard", *EFFICIENT)),
        *steps(32_768, ("standard", *EFFICIENT)),
        *operations(4096),
        *(Row("decode", name, tokens) for tokens in (1024, 65_536) for name in ("standard", *EFFICIENT)),
        *law("bfloat16", "compiled"),
        *operations(16_384, 128),
        *law("float32", "eager"),
        *operations(1024),
        *steps(4096, ("standard",), "compiled whole"),
        *steps(4096, ("standard", "bsbr"), "eager"),
        *steps(4096, ("hopfield",)),
        *(Row("operation", name, 16_384, 16, 64, form="eager") for name in ("bsbr", "linear", "gau", "delta_net")),
        Row("operation", "bsbr top-k 8", 16_384, 16, 64, form="compiled"),
        *operations(4096, 128),
        *operations(65_536, 128),
        *(Row("operation", name, tokens, 16, 64, form="fla") for tokens in (16_384, 65_536) for name in FLA),
    ]


@dataclass(frozen=True)
class Bench:
    """Where rows are measured: on the card at their size, or on a CPU at toy size."""

    device: str
    toy: bool = False
    flops_peak: float | None = None  # floating-point operations a second of the best matrix product

    def tokens(self, row: Row) -> int:
        return min(row.tokens, 130) if self.toy else row.tokens

    def dtype(self, row: Row) -> torch.dtype:
        return getattr(torch, row.dtype)

    # What a row is made of.

    def measure(self, row: Row) -> dict[str, Any]:
        return getattr(self, row.kind)(row)

    def peak(self, row: Row) -> dict[str, Any]:
        """The best matrix product, or the best copy, counting bytes read and written."""
        size = 64 if self.toy else 8192
        if row.name == "matrix product":
            a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
            out, amount = torch.empty_like(a), 2 * size**3
            return {"per_second": amount / min(self.seconds(lambda: torch.mm(a, b, out=out), samples=10))}
        source = torch.randn(8 * size**2, device=self.device)
        target = torch.empty_like(source)
        return {"per_second": 2 * source.nbytes / min(self.seconds(lambda: target.copy_(source), samples=10))}

    def law(self, row: Row) -> dict[str, Any]:
        """Relative root-mean-square errors of the fast form against the definition, the worst over a few lengths.

        Where the definition itself is further from fp64 than the law allows (a gain's gradient is a sum of signed
        products, whose rounding remains), the two may differ by twice that: each is rounded in its own way.
        """
        sys.path.insert(0, str(ROOT / "tests" / "attention"))
        from test_law import definition, results

        limit = LAW[row.dtype]
        worst: dict[str, Any] = {"output": 0.0, "gradient": 0.0, "of": "", "limit": limit, "kept": True}
        torch.manual_seed(1)
        attention = ARCHITECTURES[row.name](128, 2).double()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        attention.to(self.device, self.dtype(row))
        exact = ARCHITECTURES[row.name](128, 2).double().to(self.device)
        exact.load_state_dict(attention.state_dict())
        forward = type(attention).forward
        if row.form == "compiled" and not self.toy:
            forward = torch.compile(forward, dynamic=False)
        for tokens in (70,) if self.toy else (63, 130, 300) if row.form == "eager" else (300,):
            x = torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(tokens)).to(self.device)
            x = x.to(self.dtype(row))
            found, plain = results(forward, attention, x), results(definition, attention, x)
            truth = results(definition, exact, x.double())
            largest = max(root_mean_square(value) for value in truth.values())
            for key, value in truth.items():
                size = max(root_mean_square(value), 1e-3 * largest)
                error = root_mean_square(found[key].double() - plain[key].double()) / size
                own = [root_mean_square(form[key].double() - value) / size for form in (found, plain)]
                worst["kept"] &= error <= max(limit, 2 * own[1])
                if key == "output":
                    worst["output"] = max(worst["output"], error)
                elif not error <= worst["gradient"]:
                    facts = {"of": key.removeprefix("gradient of "), "to_fp64": own[0], "definition_to_fp64": own[1]}
                    worst |= {"gradient": error, **facts}
        return worst

    def operation(self, row: Row) -> dict[str, Any]:
        return self.both_times(self.operation_call(row))

    def operation_call(self, row: Row) -> Callable[[], object]:
        """Forward and backward of a row's operation."""
        forward, inputs = operation(row, self.tokens(row), self.device, self.dtype(row))
        if row.form == "compiled" and not self.toy:
            forward = torch.compile(forward, dynamic=False)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        mixed = forward(*inputs)
        weights = torch.randn_like(mixed, requires_grad=False)
        del mixed
        return lambda: torch.autograd.grad(forward(*inputs), inputs, weights)

    def step(self, row: Row) -> dict[str, Any]:
        model, step = self.training_step(row, MODEL["num_layers"])
        step()
        step()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(step, samples=5, least=0.15)
        tokens = self.tokens(row)
        batch = 1 if self.toy else BATCHES[tokens]
        found = {"ms": 1e3 * statistics.median(seconds), "batch": batch}
        found["tokens_per_second"] = batch * tokens / found["ms"] * 1e3
        if self.flops_peak:
            found["share_of_peak"] = 3 * batch * model.flops(tokens) / found["ms"] * 1e3 / self.flops_peak
        if self.device == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        return found

    def training_step(
        self, row: Row, layers: int, with_head: bool = True
    ) -> tuple[LanguageModel, Callable[[], object]]:
        torch.manual_seed(0)
        sizes = TOY_MODEL if self.toy else MODEL | {"num_layers": layers}
        with torch.device(self.device):
            model = LanguageModel(ARCHITECTURES[row.name], **sizes)
        hidden = self.hidden(model, row.form)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = self.tokens(row)
        shape = (1 if self.toy else BATCHES[tokens], tokens + 1)
        ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()

        def step() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                x = hidden(inputs)
                loss = F.cross_entropy(model.head(x).flatten(0, 1), targets) if with_head else x.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return model, step

    def hidden(self, model: LanguageModel, form: str) -> Callable[[Tensor], Tensor]:
        if self.toy or form == "eager":
            return model.hidden
        return torch.compile(model.hidden) if form == "compiled whole" else compile_hidden(model)

    @torch.no_grad()
    def decode(self, row: Row) -> dict[str, Any]:
        """One token of one sequence after so many."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LanguageModel(ARCHITECTURES[row.name], **(TOY_MODEL if self.toy else MODEL))
        model.to(self.dtype(row)).eval()
        ids = torch.randint(model.vocab_size, (1, self.tokens(row)), generator=torch.Generator().manual_seed(0))
        _, states = model.prefill(ids.to(self.device))
        token = ids[:, 0].to(self.device)
        _, states = model.step(token, states)  # past the place where a chunk begins
        return self.both_times(lambda: model.step(token, states))

    # Clocks.

    def both_times(self, call: Callable[[], object]) -> dict[str, Any]:
        """Milliseconds of the device (a graph's replay) and as launched from Python."""
        found: dict[str, Any] = {"launched_ms": 1e3 * statistics.median(self.seconds(call))}
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            try:
                found["device_ms"] = 1e3 * statistics.median(self.seconds(graphed(call)))
            except Exception as error:
                found["graph_error"] = one_line(error, 200)
        return found

    def seconds(self, call: Callable[[], object], samples: int = 5, least: float = 0.04) -> list[float]:
        """Seconds of a call, several times; a sample repeats it until it should last `least` seconds."""
        call()
        once = self.sample(call, 1)
        repeats = 1 if self.toy else max(1, min(200, math.ceil(least / max(once, 1e-6))))
        return [self.sample(call, repeats) for _ in range(1 if self.toy else samples)]

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    def warm(self, row: Row) -> None:
        """Compile what a row needs, as cheaply as that can be: of a model one layer."""
        if row.kind == "operation":
            self.operation_call(row)()
        elif row.kind == "step":
            _, step = self.training_step(row, 1 if row.form == "compiled" else MODEL["num_layers"], with_head=False)
            step()
        elif row.kind == "law":
            self.law(row)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def operation(row: Row, tokens: int, device: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A row's operation and its inputs, laid out in memory as a projection leaves them."""
    generator = torch.Generator(device).manual_seed(0)
    heads, width = (2, 16) if device == "cpu" else (row.heads, row.width)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device=device).to(dtype)

    def by_heads(length: int = tokens) -> Tensor:  # (B, H, T, K)
        return random(length, heads, width).transpose(1, 2)

    qkv = [by_heads() for _ in range(3)]
    if row.name == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv
    x = torch.empty(0, device=device, dtype=dtype)
    name, *top_k = row.name.split(" top-k ")
    options: dict[str, Any] = {"rope": False} if name in ("sliding_window", "bsbr", "gau") else {}
    if name == "bsbr":
        options |= {"initial_gain": 1.0, "retrieval_top_k": int(top_k[0]) if top_k else None}
    fla = row.form == "fla" and device != "cpu"
    attention: Any = ARCHITECTURES[name](heads * width, heads, **options).to(device, dtype)
    if name == "sliding_window":
        return attention.mix, qkv
    if name == "bsbr":
        chunks = -(-tokens // attention.chunk_size)
        return lambda *inputs: attention.mix(*inputs)[0], [*qkv, by_heads(chunks), by_heads(chunks)]
    if name == "linear":
        mix = fla_linear if fla else kernels.choose(x, kernels.linear_kernel, attention.mix)
        return lambda q, k, v: mix(feature(q), feature(k), at_least_fp32(v))[0], qkv
    if name == "gau":
        mix = kernels.choose(x, partial(kernels.gau_kernel, attention.views, attention.chunk_size), attention.mix)
        return lambda z, v: mix(z, v)[0], [random(tokens, attention.key_dim), random(tokens, attention.value_dim)]
    beta = torch.rand(1, heads, tokens, 1, generator=generator, device=device).to(dtype)
    if name == "delta_net":
        mix = fla_delta if fla else kernels.choose(x, kernels.delta_rule_kernel, attention.mix)
        return lambda q, k, v, beta: mix(unit(q), unit(k), at_least_fp32(v), at_least_fp32(beta))[0], [*qkv, beta]
    chance = torch.rand(1, heads, tokens, 1, generator=generator, device=device)
    log_alpha = (0.1 * chance.clamp(min=1e-6).log()).to(dtype)
    mix = kernels.choose(x, kernels.gated_delta_rule_kernel, attention.mix)
    inputs = [*qkv, beta, log_alpha]
    return lambda q, k, *rest: mix(unit(q), unit(k), *map(at_least_fp32, rest))[0], inputs


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def feature(x: Tensor) -> Tensor:
    return F.elu(at_least_fp32(x)) + 1


def unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(x), dim=-1)


def fla_linear(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """flash-linear-attention's kernel, for comparison."""
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = (part.transpose(1, 2).bfloat16().contiguous() for part in (q, k, v))
    mixed, _ = chunk_linear_attn(q, k, v, scale=1.0, output_final_state=False, normalize=False)
    total = (q.float() * k.float().cumsum(1)).sum(-1, keepdim=True) + 1e-6
    return [(mixed / total).transpose(1, 2)]


def fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> list[Tensor]:
    """flash-linear-attention's kernel, for comparison."""
    from fla.ops.delta_rule import chunk_delta_rule

    q, k, v, beta = (part.transpose(1, 2).bfloat16().contiguous() for part in (q, k, v, beta))
    mixed, _ = chunk_delta_rule(q, k, v, beta[..., 0], scale=1.0, output_final_state=False)
    return [mixed.transpose(1, 2)]


# The run: what is measured, what is compiled beforehand, what is shown.


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def missing(found: list[dict[str, Any]], wanted: list[Row], name: str) -> list[Row]:
    """The rows that have not been measured on the card of this name; those that failed are tried once more."""
    counts: dict[str, int] = {}
    for line in found:
        if line["card"] == name:
            counts[line["key"]] = counts.get(line["key"], 0) + (1 if "error" in line else 2)
    return [row for row in wanted if counts.get(row.key, 0) < 2]


def warm_up(todo: list[Row], seconds: float) -> None:
    """Compile what the rows need, in one process a core, until the time is up."""
    compiled = [row for row in todo if row.form not in ("eager",)]
    workers = min(max(1, (os.cpu_count() or 2) - 1), len(compiled))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    processes = []
    for i in range(workers):
        keys = [row.key for row in compiled[i::workers]]
        command = [sys.executable, __file__, "--warm", json.dumps(keys)]
        processes.append(subprocess.Popen(command, env=environment))
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def warm_rows(keys: list[str]) -> None:
    """What a process of `warm_up` does."""
    by_key = {row.key: row for row in rows()}
    for key in keys:
        start = time.monotonic()
        try:
            Bench("cuda").warm(by_key[key])
            print(f"compiled {key} in {time.monotonic() - start:.0f} s", flush=True)
        except Exception as error:
            print(f"could not compile {key}: {one_line(error, 300)}", flush=True)
        clean()


def clean() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in this thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure_rows(wanted: list[Row], out: Path, seconds: float, warm_seconds: float, device: str, toy: bool) -> None:
    start, name = time.monotonic(), card(device)
    todo = missing(read(out), wanted, name)
    print(f"{name}, torch {torch.__version__}: {len(todo)} of {len(wanted)} rows to measure", flush=True)
    if not toy and warm_seconds > 0 and any(row.form != "eager" for row in todo):
        warm_up(todo, warm_seconds)
        print(f"compiled beforehand in {time.monotonic() - start:.0f} s", flush=True)
    facts = {"card": name, "torch": torch.__version__, "commit": (git_commit() or {}).get("commit")}
    for row in todo:
        left = seconds - (time.monotonic() - start)
        if left < 8:
            break
        peak = [line["per_second"] for line in read(out) if line["key"] == Row("peak", "matrix product").key]
        began = time.monotonic()
        try:
            with at_most(max(5, min(75, int(left)))):
                found = Bench(device, toy, peak[-1] if peak else None).measure(row)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {one_line(error, 500)}"}
            traceback.print_exc(limit=-3)
        clean()
        line = {"key": row.key, **vars(row), **found, **facts, "took": round(time.monotonic() - began, 1)}
        with out.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        numbers = {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}
        print(f"{row.key}: {numbers} ({line['took']} s)", flush=True)


def table(out: Path) -> str:
    """The rows as Markdown tables, one for each kind, the card named above."""
    found = [line for line in read(out) if "error" not in line]
    lines = []
    for name in dict.fromkeys(line["card"] for line in found):
        here = [line for line in found if line["card"] == name]
        versions = ", ".join(dict.fromkeys(line["torch"] for line in here))
        lines += [f"One {name}, torch {versions}, bf16 where nothing else is said.", ""]
        for line in here:
            if line["kind"] == "peak":
                unit_ = "TFLOP/s" if line["name"] == "matrix product" else "TB/s"
                lines.append(f"- {line['name']}: {line['per_second'] / 1e12:.3g} {unit_}")
        lines += [
            "",
            *operations_table(here),
            "",
            *steps_table(here),
            "",
            *decode_table(here),
            "",
            *law_table(here),
            "",
        ]
    return "\n".join(lines)


def operations_table(found: list[dict[str, Any]]) -> list[str]:
    measured = [line for line in found if line["kind"] == "operation"]
    lines = ["| operation | form | heads | tokens | device, ms | launched, ms | times as fast as SDPA | GiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for line in sorted(measured, key=lambda line: (line["width"], line["tokens"])):
        same = [other for other in measured if other["name"] == "sdpa"]
        same = [other for other in same if (other["tokens"], other["width"]) == (line["tokens"], line["width"])]
        own = line.get("device_ms", line["launched_ms"])
        gain = f"{same[0].get('device_ms', same[0]['launched_ms']) / own:.3g}" if same else ""
        cells = [line["name"], line["form"], f"{line['heads']} of {line['width']}", f"{line['tokens']:,}"]
        cells += [f"{line['device_ms']:.3g}" if "device_ms" in line else "", f"{line['launched_ms']:.3g}", gain]
        lines.append("| " + " | ".join([*cells, f"{line.get('peak_gib', math.nan):.2g}"]) + " |")
    return lines


def steps_table(found: list[dict[str, Any]]) -> list[str]:
    measured = [line for line in found if line["kind"] == "step"]
    lines = ["| training step | form | sequences x tokens | ms | tokens/s | against Standard | share of peak | GiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for line in sorted(measured, key=lambda line: line["tokens"]):
        same = [other for other in measured if (other["name"], other["form"]) == ("standard", "compiled")]
        same = [other for other in same if other["tokens"] == line["tokens"]]
        gain = f"{line['tokens_per_second'] / same[0]['tokens_per_second']:.2f}" if same else ""
        cells = [line["name"], line["form"], f"{line['batch']} x {line['tokens']:,}", f"{line['ms']:.1f}"]
        cells += [f"{line['tokens_per_second']:,.0f}", gain, f"{line.get('share_of_peak', math.nan):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{line.get('peak_gib', math.nan):.1f}"]) + " |")
    return lines


def decode_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| a decoded token | after tokens | device, ms | launched, ms |", "|---|---|---|---|"]
    for line in found:
        if line["kind"] == "decode":
            device = f"{line['device_ms']:.3g}" if "device_ms" in line else ""
            lines.append(f"| {line['name']} | {line['tokens']:,} | {device} | {line['launched_ms']:.3g} |")
    return lines


def law_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| the law | dtype | form | output | largest gradient | of | its error | the definition's | kept |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for line in found:
        if line["kind"] == "law":
            numbers = [line.get(key, math.nan) for key in ("to_fp64", "definition_to_fp64")]
            cells = [line["name"], line["dtype"], line["form"], f"{line['output']:.1e}", f"{line['gradient']:.1e}"]
            cells += [line["of"], *(f"{number:.1e}" for number in numbers), "yes" if line["kept"] else "no"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def choose_options() -> Namespace:
    options = parser(__doc__)
    options.set_defaults(out=None)
    options.add_argument("--seconds", type=float, default=480, help="start no row after so many, default 480")
    options.add_argument("--warm-seconds", type=float, default=110, help="for compiling beforehand, default 110")
    options.add_argument("--kinds", nargs="+", help="peak, law, operation, step, decode; default all")
    options.add_argument("--only", help="rows whose key holds this text")
    options.add_argument("--table", action="store_true", help="print the rows so far and stop")
    options.add_argument("--list", action="store_true", help="print the keys in order and stop")
    options.add_argument("--dry-run", action="store_true", help="every row at toy size on a CPU")
    options.add_argument("--warm", help="(for its own processes) keys to compile, as JSON")
    return options.parse_args()


def main() -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{CACHE}/inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", f"{CACHE}/triton")
    chosen = choose_options()
    wanted = [row for row in rows() if not chosen.kinds or row.kind in chosen.kinds]
    wanted = [row for row in wanted if not chosen.only or chosen.only in row.key]
    if chosen.warm:
        return warm_rows(json.loads(chosen.warm))
    if chosen.out is None:
        folder = Path(tempfile.mkdtemp()) if chosen.dry_run else ROOT / "benchmarks" / "results"
        chosen.out = folder / "gpu.jsonl"
    if chosen.list:
        return print("\n".join(row.key for row in wanted))
    if not chosen.table:
        if not chosen.dry_run and not torch.cuda.is_available():
            sys.exit("there is no CUDA device here: --dry-run tries every row at toy size on the CPU")
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        device = "cpu" if chosen.dry_run else "cuda"
        measure_rows(wanted, chosen.out, chosen.seconds, chosen.warm_seconds, device, chosen.dry_run)
    print(table(chosen.out))


if __name__ == "__main__":
    main()
