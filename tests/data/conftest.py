"""A tokenizer that needs no download."""
import base64

import pytest

TINY_MERGES = {**{bytes([b]): b for b in range(256)}, b"th": 256, b"the": 257, b" the": 258, b"in": 259, b"\n\n": 260}


@pytest.fixture
def tiny_merges():
    return TINY_MERGES


@pytest.fixture
def tiny_tiktoken(tmp_path):
    path = tmp_path / "tiny.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in TINY_MERGES.items()))
    return path
