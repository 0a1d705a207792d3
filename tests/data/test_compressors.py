"""The compressors' figures are those of the programs of that name."""

import random
import shutil
import subprocess

import pytest

from bsbr_pl.data.files import compressed_bits_per_byte


def test_noise_cannot_be_compressed_and_repetition_can():
    noise = compressed_bits_per_byte(random.Random(0).randbytes(100_000))
    assert all(8 < bits < 8.02 for bits in noise.values())
    assert all(bits < 0.05 for bits in compressed_bits_per_byte(b"abc" * 30_000).values())


@pytest.mark.parametrize("name", ["xz -9", "gzip -9"])
def test_the_figure_is_that_of_the_program(name):
    program, level = name.split()
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    text = "".join(f"line {i * i}\n" for i in range(20_000)).encode()
    size = len(subprocess.run([program, level, "-c"], input=text, capture_output=True, check=True).stdout)
    # gzip's own deflate and zlib's, which Python uses, differ by a few bytes in a thousand
    assert compressed_bits_per_byte(text)[name] == pytest.approx(8 * size / len(text), rel=5e-3)
