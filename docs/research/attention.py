"""What BSBR attends to: its exact attention maps, drawn, and how sparse they are."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bsbr_pl import BSBRModel
from bsbr_pl.utils.visualization import visualize_attention


def main(seq_length=128, chunk_size=32, folder=Path(__file__).parent):
    torch.manual_seed(0)
    model = BSBRModel(
        vocab_size=10000, hidden_dim=128, num_layers=2, num_heads=4, chunk_size=chunk_size, normalize=False
    )
    input_ids = torch.randint(0, 10000, (1, seq_length))
    attention_weights = model.get_attention_weights(input_ids)  # (layers, batch, heads, T, T)

    plt.figure(figsize=(12, 6))
    visualize_attention(attention_weights)
    plt.savefig(folder / "attention.png", dpi=100, bbox_inches="tight")
    plt.close()

    sparsity = (attention_weights == 0).float().mean()
    text = f"attention_weights: {tuple(attention_weights.shape)}, {sparsity:.1%} of them exactly 0"
    print(text)
    (folder / "attention.txt").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
