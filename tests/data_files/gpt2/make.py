"""Makes the other files of this folder, in an environment with transformers (5.24.0 was used) and torch:

python tests/data_files/gpt2/make.py

A random GPT-2, no bias and no gain left at its start, and the logits that Hugging Face's implementation has for it.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
model = GPT2LMHeadModel(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
folder = Path(__file__).parent
model.save_pretrained(folder)
ids = torch.randint(257, (1, 48))
with torch.no_grad():
    save_file({"ids": ids, "logits": model(ids).logits.contiguous()}, folder / "logits.safetensors")
