"""What a newcomer gets wrong, for real: every mistake ends in one sentence that says what to do, and an exit code."""

import io
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.damage import ROOT, quiet, tiny

import train
from bsbr_pl import BSBRModel
from bsbr_pl.__main__ import run
from bsbr_pl.attention import ARCHITECTURES, LinearAttention, StandardAttention
from bsbr_pl.data import TextData
from bsbr_pl.evals import compare_models
from bsbr_pl.limits import count_parameters, memory, most_processes
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import SIZES
from bsbr_pl.module import LanguageModule
from bsbr_pl.parsing import open_streams, out_of_memory
from bsbr_pl.plain_yaml import MOST, LimitError, load

FILES = {
    "tab.yaml": "model:\n\thidden_dim: 32\n",
    "indent.yaml": "model:\n  hidden_dim: 32\n num_layers: 2\n",
    "type.yaml": "model: {hidden_dim: wide}\n",
    "option.yaml": "model: {hiden_dim: 32}\n",
    "section.yaml": "trainer: {learning_rate: 0.1}\n",
    "sections.yaml": "model: [1, 2]",
    "callback.yaml": "trainer: {callbacks: {a: 1}}",
    "top.yaml": "modl: {hidden_dim: 32}",
    "data.yaml": "data: {init_args: {sourc: x}}",
    "logger.yaml": "trainer: {logger: {init_args: {save_dirr: x}}}",
    "a_list.yaml": "model: {hidden_dim: [1, 2]}",
    "class_number.yaml": "model: {attention: {class_path: 3}}",
    "class_list.yaml": "model: {attention: [{class_path: [bsbr]}]}",
    "number.yaml": "model: {attention: 3}",
    "init_args.yaml": "model: {attention: {class_path: bsbr, init_args: 3}}",
    "data_number.yaml": "data: {class_path: 3}",
    "data_list.yaml": "data: [1]",
    "callbacks.yaml": "trainer: {callbacks: [3]}",
    "logger_list.yaml": "trainer: {logger: [3]}",
    "null_without.yaml": "without: null",
    "null_steps.yaml": "trainer: {max_steps: ~}",
    "null_batches.yaml": "trainer: {overfit_batches: null}",
    "null_anomaly.yaml": "trainer: {detect_anomaly: null}",
    "null_source.yaml": "data: {init_args: {source: null}}",
    "null_share.yaml": "data: {init_args: {val_fraction: ~}}",
    "null_rope.yaml": "model: {attention: {class_path: bsbr, init_args: {rope: null}}}",
    "configs/new.yaml": "model: {hidden_dim: 32}",
    "list.yaml": "- model\n- data\n",
    "empty.yaml": "",
    "empty.txt": "",
    "empty.jsonl": "",
    "broken.jsonl": "no row\n",
    "short.txt": "hello",
    "bsbr.yaml": "model: {attention: bsbr}\n",
}
YAML, NO = "(indent with spaces, alike within a section)", "there is no option"
SPEC = "a class is given as {class_path: NAME, init_args: {option: value}}"
IN_MODEL, TOO_FEW = "did you mean --model.hidden_dim?", "fewer than one batch of"

#: What is typed after `train.py fit --config=configs/bsbr.yaml` and options of a tiny run, and words of the answer.
MISTAKES = {
    # the command line
    "--hidden_dim=32": f"{NO} --hidden_dim: {IN_MODEL}",
    "--model.hiden_dim=32": f"{NO} --model.hiden_dim: {IN_MODEL}",
    "--model.lr=0.1": f"{NO} --model.lr: did you mean --model.learning_rate?",
    "--lr=0.1": f"{NO} --lr: did you mean --model.learning_rate?",
    "--epochs=3": f"{NO} --epochs: did you mean --trainer.max_epochs?",
    "--trainer.gpus=1": f"{NO} --trainer.gpus: did you mean --trainer.devices?",
    "--seed=1": f"{NO} --seed: did you mean --seed_everything?",
    "--batch_size=8": f"{NO} --batch_size: did you mean --data.batch_size?",
    "--trainer.logger.savedir=x": f"{NO} trainer.logger.savedir: did you mean --trainer.logger.save_dir?",
    "configs/new.yaml": f"{NO} configs/new.yaml: did you mean --config=configs/new.yaml?",
    "--without=RunRecorder": "without=RunRecorder: must be a list like [1,2]: did you mean [RunRecorder]?",
    "--without=[Recorder]": "without=['Recorder']: only RunRecorder, FiniteLoss, FailTogether, LastCheckpoint",
    "--model.attention.chunk_size=8.5": "model.attention.chunk_size=8.5: must be a whole number",
    "--model.attention.chunk_size=none": "model.attention.chunk_size=none: must be a whole number",
    "--trainer.max_steps=1e3": "trainer.max_steps=1000.0: must be a whole number",
    "--trainer.max_steps=ten": "trainer.max_steps=ten: must be a whole number",
    "-model.hidden_dim=32": f"{NO} -model.hidden_dim: {IN_MODEL}",
    "--trainer.max_step=3": f"{NO} --trainer.max_step: did you mean --trainer.max_steps?",
    "--model.batch_size=3": f"{NO} --model.batch_size: did you mean --data.batch_size?",
    "--trainer.learning_rate=1": f"{NO} --trainer.learning_rate: did you mean --model.learning_rate?",
    "--data.contxt_length=3": f"{NO} data.contxt_length: did you mean --data.context_length?",
    "--model.attention.chunksize=8": f"{NO} model.attention.chunksize: did you mean --model.attention.chunk_size?",
    "--model.attention.window_size=8": f"{NO} model.attention.window_size here, but of SlidingWindowAttention",
    "--model.LR=0.1": f"{NO} --model.LR: did you mean --model.learning_rate?",
    "--model.learning-rate=0.1": f"{NO} --model.learning-rate: did you mean --model.learning_rate?",
    "--model.learnin_rate=0.1": f"{NO} --model.learnin_rate: did you mean --model.learning_rate?",
    "--model.heads=2": f"{NO} --model.heads: did you mean --model.num_heads?",
    "--model.num_hidden_layers=2": f"{NO} --model.num_hidden_layers: did you mean --model.num_layers?",
    "--data.context_lenght=64": f"{NO} data.context_lenght: did you mean --data.context_length?",
    "--trainer.device=1": f"{NO} --trainer.device: did you mean --trainer.devices?",
    "--model.hidden_dim": "argument --model.hidden_dim: expected one argument",
    "--model.hidden_dim=wide": "model.hidden_dim=wide: must be a whole number",
    "--model.learning_rate=fast": "model.learning_rate=fast: must be a number",
    "--seed_everything=abc": "seed_everything=abc: must be true or false or a whole number",
    "--trainer.precision=bf17": "trainer.precision=bf17: must be a whole number, transformer-engine, ",
    "--model.vocab_size=10": "model.vocab_size follows from data.vocab_size: leave it out",
    "--model.attention.window=8": f"{NO} model.attention.window",
    "more": f"{NO} more",
    "--model.attention.help=bsrb": "--model.attention.help: Expected a dot import path string: bsrb",
    # names of classes
    "--model.attention=BSRBAttention": "no class is called 'BSRBAttention': did you mean BSBRAttention?",
    "--model.attention=bsbr_pl.attention.BSRB": "module 'bsbr_pl.attention' has no attribute 'BSRB'",
    "--model.attention=bsbr_pl.attention.LinearAtention": "attribute 'LinearAtention': did you mean LinearAttention?",
    "--model.attention=lightning.Trainer": "Expected 'lightning.Trainer' to be a subclass of <class 'Attention'>",
    "--model.attention=torch.nn.Linear": "torch.nn.Linear is of a package that is not trusted: add --trust=torch to",
    "--trainer.callbacks+=mypkg.Mine": "mypkg.Mine is of a package that is not trusted: add --trust=mypkg to allow it",
    "--model.attention=BSBR": "model.attention: no class is called 'BSBR': did you mean bsbr?",
    "--model.attention=Mamba": "no class is called 'Mamba': did you mean mamba2?",
    "--model.attention=RWKV-7": "no class is called 'RWKV-7': did you mean rwkv7?",
    "--model.attention=bsbr.yaml": "bsbr.yaml is a file and no class: use --config=bsbr.yaml",
    "--model.attention=configs/new.yaml": "configs/new.yaml is a file and no class: use --config=configs/new.yaml",
    "--model.attention=mamba": "model.attention: no class is called 'mamba': did you mean mamba2?",
    "--model.attention=GatedDeltaNet": "no class is called 'GatedDeltaNet': did you mean gated_delta_net?",
    "--model.attention=transformer": f"no class is called 'transformer': use one of {', '.join(ARCHITECTURES)}",
    "--trainer.logger=wandb": "trainer.logger: no class is called 'wandb': did you mean WandbLogger?",
    "--trainer.logger=tensorboard": "no class is called 'tensorboard': did you mean TensorBoardLogger?",
    "--trainer.logger=trackio": "no class is called 'trackio': use one of ",
    "--trainer.logger=null": "logger=null names no logger: false for none, or name a class like CSVLogger",
    "--trainer.logger=csv": "trainer.logger: no class is called 'csv': did you mean CSVLogger?",
    "--trainer.logger=true": "logger=true names no logger: leave it out for TensorBoard, or name a class",
    "--trainer.barebones=true": "barebones=true: a run has a logger, checkpoints and a record, which it forbids.",
    "--data=mqar": "data: no class is called 'mqar': did you mean MQARData?",
    "--data=packages": "data: no class is called 'packages': use one of TokenData, TextData, ",
    "--data=text": "data: no class is called 'text': did you mean TextData?",
    "--data=TextDta": "data: no class is called 'TextDta': did you mean TextData?",
    "--trainer.callbacks+=StepTimr": "no class is called 'StepTimr': did you mean StepTimer?",
    "--trainer.logger=Tensorboard": "no class is called 'Tensorboard': did you mean TensorBoardLogger?",
    # hybrids
    "--model.attention=3x+gla": "attention: write a hybrid as '3x gated_delta_net + standard', got '3x'",
    "--model.attention=3xgla+standard": "attention: write a hybrid as '3x gated_delta_net + standard', got '3xgla'",
    "--model.attention=gla,standard": "write a hybrid as '3x gated_delta_net + standard', got 'gla,standard'",
    "--model.attention=gla+standrad": "model.attention: no class is called 'standrad': did you mean standard?",
    "--model.attention=[gla,standrad]": "model.attention: no class is called 'standrad': did you mean standard?",
    "--model.attention=gla+transformer": "model.attention: no class is called 'transformer': use standard, ",
    # configurations
    "--config=bsrb.yaml": "bsrb.yaml': did you mean bsbr.yaml?",
    "--config=new": "/new': did you mean configs/new.yaml?",
    "--config=nowhere.yaml": "config: File does not exist: '",
    "--config=sections.yaml": "sections.yaml: model: must hold options or be left out, got [1, 2]",
    "--config=callback.yaml": f"callback.yaml: {NO} trainer.callbacks.a",
    "--config=top.yaml": f"{NO} modl.hidden_dim: {IN_MODEL}",
    "--config=data.yaml": f"data.yaml: {NO} data.sourc: did you mean --data.source?",
    "--config=logger.yaml": f"logger.yaml: {NO} trainer.logger.save_dirr: did you mean --trainer.logger.save_dir?",
    "--config=a_list.yaml": "a_list.yaml: model.hidden_dim=[1, 2]: must be a whole number",
    "--config=class_number.yaml": f"model.attention: {SPEC}",
    "--config=class_list.yaml": f"model.attention: {SPEC}",
    "--config=number.yaml": f"model.attention: {SPEC}",
    "--config=init_args.yaml": f"model.attention: {SPEC}",
    "--config=data_number.yaml": f"data: {SPEC}",
    "--config=data_list.yaml": f"data: {SPEC}",
    "--config=callbacks.yaml": f"trainer.callbacks: {SPEC}",
    "--config=logger_list.yaml": f"trainer.logger: {SPEC}",
    "--model.attention.chunk_size+=64": f"{NO} model.attention.chunk_size+: did you mean --model.attention.chunk_size?",
    "--config=null_without.yaml": "without=null: give a list, or leave the option out for its default",
    "--config=null_steps.yaml": "max_steps=null: Trainer needs a value, or leave the option out for its default",
    "--config=null_batches.yaml": "overfit_batches=null: Trainer needs a value",
    "--config=null_anomaly.yaml": "detect_anomaly=null: Trainer needs a value",
    "--config=null_source.yaml": "source=null: TextData needs a value",
    "--config=null_share.yaml": "val_fraction=null: TextData needs a value",
    "--config=null_rope.yaml": "rope=null: BSBRAttention needs a value",
    "--config=tab.yaml": "tab.yaml: no valid YAML at line 2, column 1: found character that cannot start any token",
    "--config=indent.yaml": f"indent.yaml: no valid YAML at line 3, column 2: did not find expected key {YAML}",
    "--config=type.yaml": "type.yaml: model.hidden_dim=wide: must be a whole number",
    "--config=option.yaml": f"{NO} model.hiden_dim: {IN_MODEL}",
    "--config=section.yaml": f"{NO} trainer.learning_rate: did you mean --model.learning_rate?",
    "--config=list.yaml": "list.yaml: a configuration must hold sections, `trainer:`, `model:` or `data:`",
    "--config=empty.yaml": "empty.yaml: a configuration must hold sections",
    # values
    "--data.context_length=abc": "data.context_length=abc: must be a whole number",
    "--data.val_fraction=[1]": "data.val_fraction=[1]: must be a number",
    "--data.streaming=maybe": "data.streaming=maybe: must be true or false",
    "--trainer.precision=bf16_mixed": "64, 32, 16 or bf16: did you mean bf16-mixed?",
    "--trainer.precision=fp16": "64, 32, 16 or bf16: did you mean 16-mixed?",
    "--trainer.precision=bfloat16": "64, 32, 16 or bf16: did you mean bf16-mixed?",
    "--trainer.precision=float32": "64, 32, 16 or bf16: did you mean 32-true?",
    "--trainer.strategy=ddpp": "no strategy is called 'ddpp': did you mean ddp?",
    "--model.num_heads=3": "hidden_dim must be a multiple of num_heads, got 16 and 3",
    "--model.num_heads=16": "rotary positions need an even head width, got 1: change hidden_dim or num_heads",
    "--model.num_layers=0": "num_layers must be a positive integer, got 0",
    "--seed_everything=-1": "seed_everything=-1: must be a whole number from 0 to 4294967295",
    "--model.learning_rate=-1": "learning_rate must be positive, got -1.0",
    "--model.dropout=2": "dropout must be at least 0 and below 1, got 2.0",
    "--model.attention.chunk_size=0": "chunk_size must be a positive integer, got 0",
    "--trainer.max_steps=0": "max_steps=0 trains nothing: at least 1",
    "--trainer.accumulate_grad_batches=0": "accumulate_grad_batches=0 is too small: at least 1",
    "--trainer.accumulate_grad_batches=-1": "accumulate_grad_batches=-1 is too small: at least 1",
    "--trainer.val_check_interval=0": "val_check_interval=0 is too small: at least 1",
    "--trainer.val_check_interval=-1": "val_check_interval=-1 is too small: at least 1",
    "--trainer.check_val_every_n_epoch=0": "check_val_every_n_epoch=0 is too small: at least 1",
    "--trainer.check_val_every_n_epoch=2": "check_val_every_n_epoch=2 has no effect beside val_check_interval=2, which",
    "--trainer.default_root_dir=x": "default_root_dir=x has no effect beside a logger that writes to ",
    "--trainer.log_every_n_steps=-1": "log_every_n_steps=-1 is too small: at least 0",
    "--trainer.gradient_clip_val=-1": "gradient_clip_val=-1.0 is too small: at least 0",
    "--trainer.gradient_clip_val=-0.5": "gradient_clip_val=-0.5 is too small: at least 0",
    "--trainer.gradient_clip_algorithm=most": "`gradient_clip_algorithm` most is invalid",
    "--trainer.min_steps=-3": "min_steps=-3 is too small: at least 0",
    "--trainer.max_steps=-5": "`max_steps` must be a non-negative integer or -1 (infinite steps). You passed in -5",
    "--trainer.limit_train_batches=0": "limit_train_batches=0 trains nothing: at least 1",
    "--trainer.limit_train_batches=0.0": "trains nothing",
    "--model.num_layers=65536": "num_layers=65536 is too large: at most 4096",
    "--model.hidden_dim=1e9": "model.hidden_dim=1000000000.0: must be a whole number",
    "--trainer.limit_val_batches=-1": "invalid value -1.0 for limit_val_batches",
    "--trainer.precision=7": "trainer.precision=7: must be 64, 32, 16, ",
    "--trainer.devices=0": "`Trainer(devices='0')` value is not a valid input using cpu accelerator",
    "--trainer.devices=cuda": "devices=cuda: must be how many, a list of their numbers, or auto; --trainer.accelerator",
    "--trainer.devices=1.5": "devices=1.5: must be how many, a list of their numbers, or auto",
    "--trainer.max_epochs=-2": "`max_epochs` must be a non-negative integer or -1. You passed in -2",
    "--data.source=wikitext": "source='wikitext' does not exist: use 'packages', 'gcide', 'stdlib', a file or folder",
    "--trainer.devices=-1": "devices=-1 does not work on a CPU: set the number of processes, such as 1",
    "--trainer.max_time=0": "max_time='0' must be DD:HH:MM:SS, such as 00:08:30:00",
    "--trainer.accelerator=gpu": "no device for accelerator='gpu' is here: `auto` takes what there is",
    "--trainer.accelerator=fast": "You selected an invalid accelerator name: `accelerator='fast'`",
    "--data.batch_size=0": "batch_size=0 is too small: at least 1",
    "--data.batch_size=100000": TOO_FEW,
    "--data.context_length=100000": TOO_FEW,
    "--data.source=short.txt": TOO_FEW,
    "--data.source=nowhere.txt": "source='nowhere.txt' does not exist: use 'packages', 'gcide', 'stdlib', a file",
    "--data.source=empty.txt": "source='empty.txt' has no training text",
    "--data.tokenizer=words": "tokenizer",
    "--data.tokenizer=bpe --data.bpe_vocab_size=1000000000": "bpe_vocab_size=1000000000 is too large: at most 1000000",
    "--ckpt_path=best": "--ckpt_path=best: give the file of a checkpoint, or `last` for the newest run's",
    "--ckpt_path=nowhere.ckpt": "nowhere.ckpt is not a readable checkpoint: No such file or directory",
}
TOO_DEEP, TOO_MANY = "nested more than 24 levels deep", "more than 2,000 values and keys (aliases expanded)"
NINE = [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}' if i else 'x'])}]" for i in range(9)]  # 9^9 values
NINE_MERGED = ["a0: &a0 {k: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join(9 * [f'*a{i - 1}'])}]}}" for i in range(1, 9))]
#: Configurations that would take the machine, or are mistaken in ways that YAML allows, and words of the answer.
HOSTILE = {
    "nine aliases of nine": ("\n".join(NINE), TOO_MANY),
    "in a section": ("model:\n  " + "\n  ".join(NINE), TOO_MANY),
    "merged": ("\n".join(NINE_MERGED), TOO_MANY),
    "many values": ("model: {attention: [" + 2000 * "bsbr," + "]}", TOO_MANY),
    "itself": ("model: &a [*a]", "the alias *a is inside &a, to which it refers: write its values instead"),
    "itself merged": ("model: &a\n  <<: *a", "the alias *a is inside &a"),
    "brackets": ("model: " + 3000 * "[" + 3000 * "]", TOO_DEEP),
    "brackets left open": (99_000 * "[", TOO_DEEP),
    "braces": ("model: " + 3000 * "{a: " + "1" + 3000 * "}", TOO_DEEP),
    "blocks": ("".join(" " * i + "a:\n" for i in range(400)), TOO_DEEP),
    "dashes": ("model: \n  " + 3000 * "- " + "x", TOO_DEEP),
    "dots": ("model: {" + 3000 * "a." + "a: 1}", "a key with 3001 parts is nested more than 24 levels deep"),
    "a long text": ("model: {hidden_dim: " + 200_000 * "x" + "}", "more than 100,000 bytes"),
    "a long value": ("model: {hidden_dim: " + 90_000 * "x" + "}", "xxx: must be a whole number"),
    "a long number": ("model: {hidden_dim: " + 50_000 * "9" + "}", "a whole number of 50000 digits is too long"),
    "in base 16": ("model: {hidden_dim: 0x" + 50_000 * "f" + "}", "a whole number of 50002 digits is too long"),
    "in base 60": ("model: {hidden_dim: 1" + 9000 * ":1" + "}", "a whole number of 18001 digits is too long"),
    "beyond 64 bits": (f"model: {{hidden_dim: {2**63}}}", "hidden_dim: a whole number of 19 digits is beyond 64 bits"),
    "a key twice": ("model: {hidden_dim: 16, hidden_dim: 32}", "duplicate key 'hidden_dim': remove one of the two"),
    "a section twice": ("model: {hidden_dim: 16}\nmodel: {num_layers: 2}", "duplicate key 'model'"),
    "an empty section": ("model: {hidden_dim: 16}\ntrainer:", "trainer: must hold options or be left out, got None"),
    "a list for a section": ("trainer: [1, 2]", "trainer: must hold options or be left out, got [1, 2]"),
    "a number for a section": ("model: 5", "model: must hold options or be left out, got 5"),
    "two documents": ("model: {hidden_dim: 16}\n---\nmodel: {}", "but found another document"),
    "a list as key": ("? [a, b]\n: 1", "found unhashable key"),
    "a control character": ("model: \x07", "no valid YAML at position 7: unacceptable character"),
    "code": ("model: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a name": ("model: !!python/name:os.system ls", "could not determine a constructor"),
    "bytes": ("model: {hidden_dim: !!binary aGVsbG8=}", "model.hidden_dim=b'hello': must be a whole number"),
}
#: The same as a value on the command line.
HOSTILE_VALUES = {
    f"--model.attention={3000 * '['}": TOO_DEEP,
    f"--model.attention={3000 * '[' + 3000 * ']'}": TOO_DEEP,
    f"--data={{{', '.join(NINE)}}}": TOO_MANY,
    f"--trainer.callbacks+={{{', '.join(NINE_MERGED)}}}": TOO_MANY,
    f"--config={3000 * '{a: '}": TOO_DEEP,
    "--model.attention={class_path: bsbr, class_path: linear}": "duplicate key 'class_path'",
    f"--model.hidden_dim={4000 * '9'}": "hidden_dim: a whole number of 4000 digits is beyond 64 bits",
    f"--model.hidden_dim={5000 * '9'}": "a whole number of 5000 digits is too long",
    f"--model.hidden_dim={50_000 * 'x'}": "xxx: must be a whole number",
    f"--{50_000 * 'x'}=1": f"{NO} --xxx",
    "--model.hidden_dim=1000000000": "hidden_dim=1000000000 is too large: the weights need at least ",
    "--model.num_layers=1000000000": "num_layers=1000000000 is too large: the weights need at least ",
    "--model.ff_dim=1000000000000": "ff_dim=1000000000000 is too large: the weights need at least ",
    "--model.positions=1000000000000": "positions=1000000000000 is too large: the weights need at least ",
    "--model.attention.conv_size=1000000000000": "conv_size=1000000000000 is too large: the weights need at least ",
    "--model.num_heads=1000000000": "hidden_dim must be a multiple of num_heads, got 16 and 1000000000",
    "--data.context_length=1000000000000": TOO_FEW,
    "--data.batch_size=1000000000": TOO_FEW,
    f"--data.num_workers={most_processes() + 1}": f"num_workers={most_processes() + 1} is too large: at most ",
    f"--trainer.devices={most_processes() + 1}": f"devices={most_processes() + 1} is too large: at most ",
}
#: Whole command lines of train.py.
COMMANDS = {
    "": 'expected "subcommand" to be one of {fit,validate,test,predict}, but it was not provided',
    "--config=bsbr.yaml": 'expected "subcommand" to be one of {fit,validate,test,predict}',
    "train --config=bsbr.yaml": "invalid choice: 'train' (choose from 'fit', 'validate', 'test', 'predict')",
    "--config=bsbr.yaml fit": ": the command comes first, as in `fit --config=FILE`",
    "bsbr.yaml": "'predict'): did you mean fit --config=bsbr.yaml?",
    "run --config=bsbr.yaml": "'predict'): did you mean fit?",
    "fti --config=bsbr.yaml": "invalid choice: 'fti' (choose from 'fit', 'validate', 'test', 'predict'): did you mean",
    "fit": "model.attention must be given: --model.attention=..., or a --config that sets it",
    "validate --config=bsbr.yaml": "validate needs a trained model: --ckpt_path=<file>, or `last`",
    "validate --config=bsbr.yaml --ckpt_path=x --trainer.limit_val_batches=0": "limit_val_batches=0 reads nothing",
    "predict --config=bsbr.yaml --ckpt_path=x --trainer.limit_predict_batches=0": "limit_predict_batches=0 reads",
    "test --config=bsbr.yaml --ckpt_path=last": "--ckpt_path=last: there is no runs/*/checkpoints/last.ckpt",
}
#: Those of evaluate.py.
EVALUATIONS = {
    "": "paths must be given",
    "runz": "runz is not there: give a folder, file or pattern with checkpoints",
    "confgs": "confgs is not there: did you mean configs?",
    "nothing/*.ckpt": "nothing/*.ckpt is not there: give a folder, file or pattern",
    ".": ". has no checkpoint (*.ckpt)",
    "trained --lenghts=[16]": f"{NO} --lenghts: did you mean --lengths?",
    "trained --lengths=16": "lengths=16: must be a list like [1,2]",
    "trained --lengths=256,1024": "lengths=256,1024: must be a list like [1,2]: did you mean [256,1024]?",
    "trained --lengths=1k": "lengths=1k: must be a list like [1,2]",
    "trained --dtype=bf16": "dtype=bf16: must be float32, bfloat16 or float64: did you mean bfloat16?",
    "trained --out=x": f"{NO} --out: did you mean --output_dir?",
    "trained --device=gpu": "device='gpu' cannot be used here: give cpu, cuda or cuda:0",
    "empty.jsonl": "there is no row of a result in empty.jsonl",
    "trained --trust=nowhere_to_find": "No module named 'nowhere_to_find'",
    "trained --rounds=0": "rounds must be at least 1, got [0]",
    "trained --dtype=fp32": "dtype=fp32: must be float32, bfloat16 or float64: did you mean float32?",
    "trained --device=cuda:99": "device='cuda:99' cannot be used here",
    "trained --config=x.yaml": f"{NO} --config",
    "trained --split=tst": "split=tst: must be val or test: did you mean test?",
    "nowhere.jsonl": "nowhere.jsonl: No such file or directory",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch, one_thread):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def answer(call, capsys) -> str:
    """What a command that exits says: one line, and at most one that says where to read on."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    code, said = stopped.value.code, capsys.readouterr().err
    assert code not in (0, None)
    said += code if isinstance(code, str) else ""  # as Python prints it
    place = said.rfind(".py: error: ")
    first, *more = said[place:].strip().splitlines()
    assert place >= 0
    assert len(first) < 500
    assert [line.endswith("--help` shows every option") for line in more] in ([], [True])
    assert "usage:" not in said
    return first.removeprefix(".py: error: ")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_options_of_a_training(mistake, folder, capsys):
    options = ["fit", *tiny(folder), *mistake.split()]
    assert MISTAKES[mistake] in answer(lambda: train.command_line(options), capsys)
    assert not (folder / "runs").exists(), "a failed run leaves no folder"


def test_a_metric_that_no_callback_can_wait_for(folder, tmp_path, capsys):
    options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"]
    options.append(f"--trainer.logger.save_dir={tmp_path}")
    said = answer(lambda: train.command_line(["fit", *tiny(folder), *options]), capsys)
    assert said.startswith("monitor=val/los: no such metric, there are `train/loss`, `val/loss`, ")


@pytest.fixture
def _soon():
    """What is not refused before it is expanded would have no end."""

    def too_long(*signal_and_frame):
        raise TimeoutError("no answer within 20 seconds of computing")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)  # whatever else the machine does meanwhile
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration(name, folder, capsys):
    content, words = HOSTILE[name]
    (folder / "hostile.yaml").write_text(content)
    said = answer(lambda: train.command_line(["fit", *tiny(folder), "--config=hostile.yaml"]), capsys)
    assert words in said
    assert name == "beyond 64 bits" or said.startswith("hostile.yaml: ")


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=lambda value: value[:40])
def test_a_hostile_value(value, folder, capsys):
    said = answer(lambda: train.command_line(["fit", *tiny(folder), value]), capsys)
    assert HOSTILE_VALUES[value] in said


@pytest.mark.usefixtures("_soon")
def test_a_hostile_value_of_an_evaluation(capsys):
    assert TOO_DEEP in answer(lambda: run("evaluate", ["trained", f"--lengths={3000 * '['}"], "evaluate.py"), capsys)


def test_aliases_count_as_what_they_stand_for():
    """`a`, a list and its `each` values, and `b` with a list of `times` aliases."""

    def text(each: int, times: int) -> str:
        return f"a: &a [{', '.join(each * ['x'])}]\nb: [{', '.join(times * ['*a'])}]"

    each, times = 49, 38
    assert 1 + 2 + (1 + each) * (1 + times) + 1 <= MOST < 1 + 2 + (1 + each) * (2 + times) + 1
    assert load(text(each, times)) == {"a": each * ["x"], "b": times * [each * ["x"]]}
    with pytest.raises(LimitError, match=re.escape(TOO_MANY)):
        load(text(each, times + 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_parameters_are_counted_without_making_them(architecture, num_layers):
    module = LanguageModule(
        ARCHITECTURES[architecture], 257, hidden_dim=32, num_layers=num_layers, num_heads=2, positions=7
    )
    attention, arguments = module.hparams["attention"], {size.name: module.hparams[size.name] for size in SIZES}
    assert count_parameters(attention, arguments) == sum(p.numel() for p in module.model.parameters())
    if num_layers == 3:
        assert count_parameters([attention] * 3, arguments) == count_parameters(attention, arguments)


def test_an_allocator_that_refuses_is_answered_in_a_sentence():
    for allocate, asked in (
        (lambda: torch.empty(10**15), "4000000000000000 bytes"),
        (lambda: np.empty(10**15), "7.11 "),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate()
        said = out_of_memory(error.value)
        assert said.startswith(f"there is not enough memory ({asked}")
        assert said.endswith("lower batch_size, context_length, hidden_dim or num_layers")
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_model_must_fit_into_half_the_memory():
    """The weights of one standard layer without feed-forward network: 4 D^2 + 2 D, and (vocab_size + 2) D around it."""

    def needed(width: int) -> int:
        return 4 * (4 * width**2 + (257 + 4) * width)

    width = next(width for width in range(64, 10**9, 64) if needed(width) > memory() / 2)
    arguments = {"vocab_size": 257, "hidden_dim": width, "num_layers": 1, "num_heads": 1, "ff_dim": 0}
    with pytest.raises(ValueError, match=rf"hidden_dim={width} is too large: the weights need at least [\d.]+ GiB"):
        LanguageModule(partial(StandardAttention), **arguments)
    described = {"class_path": "bsbr_pl.attention.StandardAttention", "init_args": {}}
    rest = {"positions": 0}
    assert 4 * count_parameters(described, arguments | rest) == needed(width)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_command(command, capsys):
    assert COMMANDS[command] in answer(lambda: train.command_line(command.split()), capsys)


@pytest.mark.parametrize("command", EVALUATIONS)
def test_a_mistake_in_an_evaluation(command, capsys):
    assert EVALUATIONS[command] in answer(lambda: run("evaluate", command.split(), "evaluate.py"), capsys)


def test_a_warning_of_a_command_is_one_line(folder):
    command = [sys.executable, "-m", "bsbr_pl", "report", folder / "broken.jsonl"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr.splitlines()
    assert said[0].startswith(f"Warning: {folder / 'broken.jsonl'}: 1 lines that are no rows of schema 3 are left out")
    assert said[1] == f"bsbr_pl: error: there is no row of a result in {folder / 'broken.jsonl'}"


def test_the_script_itself_says_no_more(folder):
    command = [sys.executable, ROOT / "train.py", "fit", *tiny(folder), "--model.num_heads=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 1
    last = "train.py: error: hidden_dim must be a multiple of num_heads, got 16 and 3"
    assert result.stderr.strip().splitlines()[-1] == last
    assert "Traceback" not in result.stderr


def test_the_help_begins_with_what_is_ours(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: train.py fit [--config=FILE ...] [--SECTION.OPTION=VALUE ...]\n")
    assert f"one of {', '.join(ARCHITECTURES)}, or a class" in " ".join(said.split())
    places = [said.index(f"  --{option} ") for option in ("model.attention", "model.hidden_dim", "data", "trainer")]
    assert places == sorted(places)


def test_the_help_of_the_script_begins_with_a_command_that_trains(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "Train, validate or test any attention as a language model: python train.py fit --config" in " ".join(
        capsys.readouterr().out.split()
    )


IN_PYTHON = {
    "an option": (lambda: BSBRModel(10, chunk=3), "BSBRModel has no argument 'chunk'; it has vocab_size, hidden_dim"),
    "a width": (lambda: BSBRModel(10, hidden_dim=17), "hidden_dim must be a multiple of num_heads, got 17 and 4"),
    "ids": (lambda: BSBRModel(10)(torch.tensor([[10]])), r"input_ids must lie in 0 ... 9 \(vocab_size\), got 10"),
    "shape": (lambda: BSBRModel(10)(torch.tensor([1])), r"input_ids must be \(batch, length\) in int64"),
    "attention": (
        lambda: LanguageModule("bsrb", 10),
        "attention must be one of standard, .*, bsbr, or a class of a package",
    ),
    "no checkpoint": (lambda: LanguageModule.load("nowhere.ckpt"), "nowhere.ckpt is not a readable checkpoint"),
    "no text": (
        lambda: TextData("nowhere").prepare_data(),
        "source='nowhere' does not exist: use 'packages', 'gcide', 'stdlib',",
    ),
    "a name": (lambda: compare_models((8,), ("BSRB",)), "no model is called 'BSRB': did you mean BSBR?"),
    "a far name": (lambda: compare_models((8,), ("XLSTM",)), "no model is called 'XLSTM'; there are BSBR, Linear"),
    "no steps": (lambda: compare_models((8,), train_steps=-1), "train_steps must be an integer of at least 0, got -1"),
    "an object": (
        lambda: compare_models((8,), {"mine": BSBRModel(10)}),
        "attention must be an Attention class or a functools.partial of one, got an object of BSBRModel",
    ),
    "a whole model": (
        lambda: compare_models((8,), {"mine": BSBRModel}),
        "attention: BSBRModel is a whole model: give its BSBRAttention",
    ),
    "a module of another library": (
        lambda: LanguageModel(lambda hidden_dim, num_heads: torch.nn.Linear(hidden_dim, hidden_dim), 10),
        r"attention must build an Attention, not a Linear: AttentionSpec\(Linear\) makes it one",
    ),
    "a device": (lambda: compare_models((8,), device="gpu"), "device='gpu' cannot be used here: give cpu, cuda"),
    "no rounds": (lambda: compare_models((8,), rounds=0), "rounds must be at least 1, got 0"),
    "one name": (lambda: compare_models((8,), "BSBR"), "models must be a list of names, or a dict .*, got 'BSBR'"),
    "a class in a list": (lambda: compare_models((8,), [BSBRModel]), "models must be a list of names, or a dict .*"),
    "one metric": (lambda: compare_models((8,), metrics="flops"), "metrics must be a list of names, got 'flops'"),
    "one length": (lambda: compare_models(8), "seq_lengths must be a list of lengths, got 8"),
    "a task's name": (lambda: compare_models((8,), task="mqar"), "task must be a data set of bsbr_pl.data, got 'mqar'"),
}


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_a_mistake_in_python(mistake):
    call, words = IN_PYTHON[mistake]
    with pytest.raises((ValueError, TypeError), match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        (["--model.attention=linear", "--model.attention.chunk_size=8"], [LinearAttention]),
        (["--config=key.yaml"], [LinearAttention]),
        (["--config=keys.yaml", "--model.num_layers=2"], [LinearAttention, StandardAttention]),
    ],
    ids=lambda value: str(value[0]),
)
def test_an_architecture_is_known_by_its_key(choice, layers, folder, tmp_path):
    (folder / "key.yaml").write_text("model: {attention: {class_path: linear, init_args: {chunk_size: 8}}}")
    (folder / "keys.yaml").write_text(
        "model: {attention: [{class_path: linear, init_args: {chunk_size: 8}}, standard]}"
    )
    with quiet():
        cli = train.main(["fit", *tiny(folder), f"--trainer.logger.save_dir={tmp_path}", *choice])
    attentions = cli.model.model.attentions
    assert [type(attention) for attention in attentions] == layers
    assert attentions[0].chunk_size == 8
    assert "class_path: bsbr_pl.attention.LinearAttention" in Path(cli.trainer.log_dir, "config.yaml").read_text()


def test_characters_that_a_terminal_cannot_show_are_replaced(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    open_streams()
    print("caf\ufffd", flush=True)
    assert shown.buffer.getvalue() == b"caf?\n"
