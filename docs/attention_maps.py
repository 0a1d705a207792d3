"""Draw the attention map of each architecture on real text: `python docs/attention_maps.py [KEY ...]`.

For each architecture, two layers are trained on the source code of Python's standard library: vocabulary 2,048, 160
steps of 16 x 128 tokens, about half a minute on one core. The map of the first 128 tokens of the validation text is
written to docs/img/architectures/KEY.png. Chunks and windows have 32 tokens, so that the map shows attention outside
them. If a layer has weights above 1 (GAU's weights are not normalised), its maps are divided by its largest weight.
"""

import inspect
import io
import sys
import tempfile
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from bsbr_pl.attention import ARCHITECTURES  # noqa: E402
from bsbr_pl.data import TextData  # noqa: E402
from bsbr_pl.evals.training import train_all  # noqa: E402
from bsbr_pl.module import LanguageModule  # noqa: E402
from bsbr_pl.utils.visualization import visualize_attention  # noqa: E402

REACH = 32


def main(keys=(), steps=160, context_length=128, folder=DOCS / "img" / "architectures", source="stdlib", **sizes):
    data = TextData(source, bpe_vocab_size=2048, context_length=context_length, batch_size=16)
    data.prepare_data()
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys or ARCHITECTURES:
        module = train_briefly(key, data, steps, **{"hidden_dim": 128, "num_layers": 2, "num_heads": 4} | sizes)
        input_ids = next(iter(data.loader("val")))["input_ids"][:1]
        maps = module.model.get_attention_weights(input_ids)  # (layers, 1, heads, T, T)
        maps = maps / maps.abs().amax((1, 2, 3, 4), keepdim=True).clamp(min=1)
        draw(maps, folder / f"{key}.png")
        print(folder / f"{key}.png", flush=True)


def draw(maps, path):
    """Write the maps as a PNG with 64 colours, a third of the size."""
    plt.figure(figsize=(2.2 * maps.shape[2] + 2, 2.2 * maps.shape[0] + 1))
    visualize_attention(maps)
    file = io.BytesIO()
    plt.savefig(file, dpi=90, bbox_inches="tight")
    plt.close()
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)


def train_briefly(key, data, steps, **sizes):
    """Train the architecture for `steps` steps, with chunks and windows of REACH tokens."""
    known = inspect.signature(ARCHITECTURES[key]).parameters
    attention = partial(ARCHITECTURES[key], **{name: REACH for name in ("chunk_size", "window_size") if name in known})
    arguments = {"attention": attention, "vocab_size": data.vocab_size} | sizes
    with tempfile.TemporaryDirectory() as folder:
        files = train_all({key: arguments}, data, steps, 1e-2, 0, torch.device("cpu"), Path(folder))
        return LanguageModule.load(files[key])


if __name__ == "__main__":
    main(sys.argv[1:])
