"""What the command line does with models. The arguments of the functions are its options."""

import importlib.util
import pkgutil
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data.tokenizer import ByteTokenizer, Tokenizer
from bsbr_pl.foreign import build, trust
from bsbr_pl.models import model_class
from bsbr_pl.results import NotKeptError, Results
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.files import write_json, write_whole
from bsbr_pl.utils.records import default_device
from bsbr_pl.values import one_line

from . import certificate, matching
from .checkpoints import Checkpoint, open_checkpoint, read_all
from .evaluation import LENGTHS, MULTIPLES, Evaluation
from .retrieval import as_text
from .retrieval import retrieval as ask_all
from .saved_data import HERE, DataLocation
from .submit import submit as submit


def evaluate(
    paths: Sequence[str],
    output_dir: str = "evaluation",
    split: Literal["val", "test"] = "val",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    multiples: list[int] = list(MULTIPLES),  # noqa: B006 - never changed; the command line shows it as the default
    lengths: list[int] = list(LENGTHS),  # noqa: B006
    rounds: int = 5,
    data: DataLocation = HERE,
    trust_data: bool = False,
    latex: str | None = None,
) -> int:
    """Certify checkpoints, measure their accuracy and their costs, and write a report.

    Returns 0 if at least one checkpoint was evaluated, 1 if none was, 2 if results cannot be written, 130 after Ctrl-C.
    A report of the results so far is written in any case.

    Args:
        paths: folders, files or patterns of checkpoints (*.ckpt) that train.py wrote
        output_dir: where results.jsonl, report.html, report.md, tables and plots go; existing results are reused
        split: split of each checkpoint's own data
        device: cpu, cuda, ...; auto takes a GPU where there is one
        dtype: of weights and computation
        multiples: context lengths for text, as multiples of the training length
        lengths: tokens of the sequences that time, memory and FLOPs are measured on; an empty list for none
        rounds: timing rounds; every round times all models
        data: present location of the training text, if its prepared tokens are not in the cache
        trust_data: read the paths and Hub names in the checkpoint, with its sizes and workers
        latex: folder for tables (booktabs) and figures (PDF, 3.25 inches wide) of a paper

    Raises:
        ValueError: naming the argument, or a path that holds no checkpoint.
        OSError: naming what cannot be read or written.
    """
    keep_freed_memory()
    for name, values in (("multiples", multiples), ("lengths", lengths), ("rounds", [rounds])):
        if any(value < 1 for value in values):
            raise ValueError(f"{name} must be at least 1, got {values}")
    device = _usable(device)
    checkpoints = read_all(paths, data, trust_data)
    subjects = [one.subject(this_command()) for one in checkpoints if isinstance(one, Checkpoint)]
    results = Results(Path(output_dir) / "results.jsonl")
    evaluation = Evaluation(results, device=device, dtype=dtype, rounds=rounds)
    code = int(not subjects)
    try:
        for one in checkpoints:
            evaluation.problem({"kind": "checkpoint"}, one.name, {"checkpoint": {"name": one.name}}, one.problem)
        evaluation.run(subjects, split, multiples, lengths)
    except KeyboardInterrupt:
        code = 130
        print("\nStopped. The report has the results so far. Run the same command to continue.", file=sys.stderr)
    except NotKeptError as error:
        code = 2
        print(f"Stopped, because results cannot be written: {one_line(error)}", file=sys.stderr)
    from bsbr_pl.report import warnings, write_latex, write_report  # what draws is imported once everything is measured

    rows = evaluation.rows(subjects)
    report = write_report(rows, Path(output_dir))
    for problem in evaluation.problems:
        name, words = problem["about"]["checkpoint"]["name"], problem["values"]["problem"]
        print(words if words.startswith(name) else f"{name}: {words}", file=sys.stderr)
    for warning in warnings(rows):
        print(f"Warning: {warning}", file=sys.stderr)
    print(report)
    if latex is not None:
        print(write_latex(rows, Path(latex)))
    return code


def _usable(device: str) -> str:
    if device == "auto":
        return str(default_device(None))
    try:
        torch.empty(0, device=default_device(device))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for it
        raise ValueError(f"device={device!r} cannot be used here: {one_line(error)}") from error
    return device


def this_command() -> str:
    """The command line of this process."""
    script = Path(sys.argv[0]).name
    start = {"__main__.py": ["python", "-m", "bsbr_pl"], "bsbr": ["bsbr"]}.get(script, ["python", script])
    return shlex.join([*start, *sys.argv[1:]])


def certify(
    module: str,
    hidden_dim: int | None = None,
    num_heads: int | None = None,
    vocab_size: int | None = None,
    options: dict[str, Any] | None = None,
    length: int | None = None,
    compile: bool = False,
    seed: int = 0,
) -> int:
    """Check that a module of your own is causal. Its package is imported, also from the working directory.

    Returns 0 if it is, 1 if it is not; the last line names the first token that saw the future.

    Args:
        module: class or function that builds it: my_package.attention:MyAttention
        hidden_dim: width of a module (B, T, D) -> (B, T, D), passed as hidden_dim, dim, d_model, ...
        num_heads: passed as num_heads, heads, n_heads, ..., if its signature has one of these
        vocab_size: token ids of a language model that does not tell them
        options: "its other arguments: {window_size: 64}"
        length: tokens; 256, or 131 of a language model, unless the module tells its windows and chunks
        compile: also check torch.compile, for at most a minute
        seed: of the weights and of the random inputs
    """
    package = module.partition(":")[0].partition(".")[0]
    print(f"importing {package}, as you named it: its code runs here", file=sys.stderr)
    trust([package])
    try:
        make = pkgutil.resolve_name(module)
    except AttributeError as error:
        raise ValueError(f"module={module!r} is not there: {error}") from error
    if not callable(make):
        raise ValueError(f"module={module!r} names no class or function that builds an nn.Module")
    torch.manual_seed(seed)
    built = build(make, hidden_dim, num_heads, options or {})
    if not isinstance(built, torch.nn.Module):
        raise ValueError(f"module={module!r} must build an nn.Module, got a {type(built).__name__}")
    found = certificate.certify(built, hidden_dim, vocab_size=vocab_size, length=length, compile=compile, seed=seed)
    return int(not found.passed)


def match(
    match: Literal["params", "flops", "state_bytes", "step_time"],
    reference: str = "standard",
    tokens: int = 512,
    architectures: list[str] = list(ARCHITECTURES),  # noqa: B006 - never changed; the command line shows the default
    vocab_size: int = 8192,
    hidden_dim: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    ff_dim: int | None = None,
    model_options: dict[str, dict[str, Any]] | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    device: str = "cpu",
    out: str | None = None,
) -> int:
    """Print the sizes at which architectures have the budget of a reference.

    Args:
        match: the quantity that becomes equal
        reference: reference architecture, a key of ARCHITECTURES
        tokens: length of the sequence
        architectures: the architectures to match
        vocab_size: vocabulary size of the training data
        hidden_dim: width of the reference, and initial width of the others
        num_layers: number of layers
        num_heads: heads of each attention
        ff_dim: width of the feed-forward networks; 4 * hidden_dim if null, 0 for none
        model_options: "architecture -> its options: {bsbr: {chunk_size: 64}}"
        batch_size: sequences of a training step, for step_time
        rounds: samples of each time
        device: where to take times: cpu, cuda, ...; auto takes a GPU where there is one
        out: folder for one YAML per architecture, for train.py
    """
    sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads, "ff_dim": ff_dim}
    options = model_options or {}
    models = {
        name: {"attention": model_class(name).factory(**options.get(name, {})), "vocab_size": vocab_size, **sizes}
        for name in dict.fromkeys([reference, *architectures, *options])
    }
    timing: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "device": _usable(device)}
    found = matching.match(match, models, tokens, reference, **timing)
    print(f"{match} to match: {reference} at {tokens} tokens; the other quantities as shares of the reference's\n")
    print(matching.table(match, tokens, found, reference))
    if out:
        for name, one in found.items():
            comment = f"{match} at {tokens} tokens, {vocab_size} ids: {one.mismatch_percent:+.2f} % against {reference}"
            model = one.as_dict()["arguments"]
            del model["vocab_size"]
            content = f"# {comment}\n{yaml.safe_dump({'model': model}, sort_keys=False)}"
            write_whole(Path(out) / f"{name}.yaml", content.encode())
    return 0


def retrieval(
    checkpoint: str,
    split: Literal["train", "val", "test"] = "test",
    device: str = "cpu",
    out: str | None = None,
    data: DataLocation = HERE,
    trust_data: bool = False,
) -> int:
    """Print where a trained model fails on its own recall task.

    Args:
        checkpoint: file (*.ckpt) that train.py wrote
        split: of the data that it was trained on
        device: cpu, cuda, ...; auto takes a GPU where there is one
        out: JSON file for all numbers
        data: present location of the training text, if its prepared tokens are not in the cache
        trust_data: read the paths and Hub names in the checkpoint, with its sizes and workers
    """
    opened = open_checkpoint(checkpoint, data, trust_data)
    found = ask_all(opened.module.model.to(_usable(device)).eval(), opened.open_data(), split)
    print(as_text(found))
    if out:
        write_json(Path(out), {"checkpoint": checkpoint, "split": split, **found})
    return 0


def lm_eval(
    checkpoint: str,
    tasks: str,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str = "auto",
    out: str | None = None,
    data: DataLocation = HERE,
    trust_data: bool = False,
) -> int:
    """Evaluate a trained model on tasks of the lm-evaluation-harness.

    Args:
        checkpoint: file (*.ckpt) that train.py wrote, of a model trained on text
        tasks: names of tasks, separated by commas
        include_path: folder of further tasks; a task is code, which the harness executes
        num_fewshot: examples in each prompt; what the task says by default
        limit: documents of each task, or a share of them below 1; all by default
        batch_size: texts that are read at once
        max_length: tokens of the longest context; the length of training by default
        device: cpu, cuda, ...; auto takes a GPU where there is one
        out: JSON file for all results
        data: present location of the training text, if its prepared tokens are not in the cache
        trust_data: read the paths and Hub names in the checkpoint, with its sizes and workers
    """
    _need("lm_eval", "lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from .harness import HarnessModel

    opened = open_checkpoint(checkpoint, data, trust_data)
    tokenizer = _text_tokenizer(opened)
    if tokenizer is None or opened.data is None:
        raise ValueError(f"{checkpoint} was not trained on text, so it reads no task of the harness")
    manager, names = TaskManager(include_path=include_path), tasks.split(",")
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"tasks: the harness has no task {unknown[0]!r}; --include_path=FOLDER adds yours")
    length = max(opened.data.train_lengths) if max_length is None else max_length
    model = HarnessModel(opened.module.model.to(_usable(device)), tokenizer, length, batch_size)
    options = {"num_fewshot": num_fewshot, "limit": limit, "log_samples": False}
    found = simple_evaluate(model, tasks=names, task_manager=manager, **options)
    print(make_table(found))
    if out:
        write_json(Path(out), {"checkpoint": checkpoint, "max_length": length, "results": found["results"]})
    return 0


def export(checkpoint: str, folder: str, data: DataLocation = HERE, trust_data: bool = False) -> int:
    """Write a trained model as a folder that Hugging Face's transformers reads after `import bsbr_pl.hf`.

    Args:
        checkpoint: file (*.ckpt) that train.py wrote
        folder: for model.safetensors, config.json and the tokenizer
        data: present location of the training text, if its prepared tokens are not in the cache
        trust_data: read the paths and Hub names in the checkpoint, with its sizes and workers
    """
    _need("transformers", "hf")
    from bsbr_pl import hf

    opened = open_checkpoint(checkpoint, data, trust_data)
    tokenizer = _text_tokenizer(opened)
    hf.export(opened.module.model, opened.module.hparams, tokenizer, folder)
    print(folder if tokenizer else f"{folder} (without a tokenizer: the model was not trained on text)")
    return 0


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed: pip install 'bsbr-pl[{extra}]'")


def _text_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of the training text; None if the model was not trained on text."""
    if checkpoint.data is None or checkpoint.data.kind != "text":
        return None
    if checkpoint.data_arguments.get("tokenizer") == "bytes":
        return ByteTokenizer()
    return checkpoint.open_data().tokenizer  # type: ignore[attr-defined]
