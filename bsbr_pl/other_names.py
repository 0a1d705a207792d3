"""What other libraries call options, commands and values of this one: for answers to mistakes."""

#: Option of another library -> option of this one.
OTHER_NAMES = {
    **{"lr": "learning_rate", "wd": "weight_decay", "epochs": "max_epochs", "steps": "max_steps"},
    **{"device": "devices", "gpus": "devices", "seed": "seed_everything", "dataset": "source"},
    **{"block_size": "context_length", "seq_len": "context_length", "intermediate_size": "ff_dim"},
    **dict.fromkeys(("d_model", "dim", "hidden", "n_embd", "width"), "hidden_dim"),
    **dict.fromkeys(("depth", "n_layers", "num_hidden_layers"), "num_layers"),
    **dict.fromkeys(("heads", "n_heads", "num_attention_heads"), "num_heads"),
    **{"out": "output_dir", "output": "output_dir", "models": "architectures"},
}
#: Commands of train.py.
OTHER_COMMANDS = {"train": "fit", "run": "fit", "resume": "fit", "eval": "validate", "evaluate": "validate"}
#: Values of precision and of dtype; the one that an option has is meant.
OTHER_VALUES = {
    **dict.fromkeys(("fp16", "float16", "half"), ("16-mixed",)),
    **dict.fromkeys(("bf16", "bfloat16"), ("bf16-mixed", "bfloat16")),
    **dict.fromkeys(("fp32", "float32", "float"), ("32-true", "float32")),
    **dict.fromkeys(("fp64", "float64", "double"), ("64-true", "float64")),
}
