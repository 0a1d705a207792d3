"""What general-purpose compressors make of a text: a floor that a language model's bits per byte must beat."""

import gzip
import lzma


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of `text` (not empty) as `xz -9` and `gzip -9` compress it, headers included."""
    sizes = {"xz -9": len(lzma.compress(text, preset=9)), "gzip -9": len(gzip.compress(text, compresslevel=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}
