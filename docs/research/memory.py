"""The memory of one forward pass of BSBR at several chunk sizes."""

from pathlib import Path

import torch

from bsbr_pl import BSBRModel
from bsbr_pl.utils.memory import analyze_memory_usage, profile_memory_usage


def main(chunk_sizes=(32, 64, 128, 256), seq_length=1024, hidden_dim=512, folder=Path(__file__).parent):
    torch.manual_seed(0)
    lines = []
    for chunk_size in chunk_sizes:
        model = BSBRModel(
            vocab_size=10000,
            hidden_dim=hidden_dim,
            num_layers=4,
            num_heads=8,
            chunk_size=chunk_size,
            ff_dim=2048,
            dropout=0.1,
        ).eval()
        input_ids = torch.randint(0, 10000, (1, seq_length))
        usage = profile_memory_usage(model, input_ids)  # {'peak_memory': MB, 'current_memory': MB}
        training = analyze_memory_usage(model, input_ids, backward=True)
        lines.append(
            f"chunk_size {chunk_size:3}: peak_memory {usage['peak_memory']:.1f} MB, "
            f"current_memory {usage['current_memory']:.1f} MB (parameters {training['parameters']:.1f} MB); "
            f"with the backward pass: activations {training['activations']:.1f} MB at their peak"
        )
    text = "\n".join(lines)
    print(text)
    (folder / "memory.txt").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
