import contextlib
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.errors import UserError
from fr_core.verify.bins import read_bin
from fr_core.verify.pair_lists import read_pairs
from fr_core.verify.pairs import read_images

IMAGES = [b"\xff\xd8 face %d" % i * (1 + 40 * i) for i in range(40)]
FLAGS = [i % 2 == 0 for i in range(20)]


def write(path, content, protocol):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [tuple, list])
def test_sets_of_every_binary_protocol(tmp_path, protocol, kind):
    path = write(tmp_path / "lfw.bin", kind([IMAGES, FLAGS]), protocol)
    assert read_bin(path) == (IMAGES, FLAGS)


def test_what_python_2_wrote(tmp_path):
    """Python 2 wrote bytes as BINSTRING and SHORT_BINSTRING in protocol 2."""
    strings = [b"short", b"long \xff" * 100]
    written = b"".join(
        (b"U" + struct.pack("<B", len(s)) if len(s) < 256 else b"T" + struct.pack("<I", len(s))) + s for s in strings
    )
    path = tmp_path / "py2.bin"
    path.write_bytes(b"\x80\x02]q\x00(" + written + b"e]q\x01\x88a\x86q\x02.")
    assert read_bin(path) == (strings, [True])


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_program_is_refused_and_does_not_run(tmp_path, protocol):
    proof = tmp_path / "ran"
    for evil in (Evil(exec, f"open({str(proof)!r}, 'w')"), Evil(open, str(proof), "w")):
        for content in (evil, ([b"a", evil], [True]), ([b"a", b"b"], [evil])):
            with pytest.raises(UserError, match="not a verification set: "):
                read_bin(write(tmp_path / "evil.bin", content, protocol))
    assert not proof.exists()


def test_other_codecs_and_other_calls_of_the_encoder_are_refused(tmp_path):
    for tail in (b"X\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.", b")R.", b"."):
        (tmp_path / "a.bin").write_bytes(b"\x80\x02c_codecs\nencode\n" + tail)
        with pytest.raises(UserError, match="not a verification set"):
            read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (([b"a"], [True]), "1 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        (([b"a", "b"], [True]), "expected a list of encoded images"),
        (([b"a", b"b"], [2]), "expected a list of flags"),
        ((b"a", b"b", b"c"), "expected images and flags"),
        ({"a": 1}, "expected images and flags"),
        ({("a",): 1}, "a key that is neither text nor number"),
        (np.zeros(3), "it would run"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_bin(write(tmp_path / "a.bin", content, 4))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"]",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62),  # more bytes than any memory has
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"].",
        b"]r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo of four thousand million entries
        b"(((((e.",
        b"]]a]a]q\x00h\x00a.",  # a list that contains itself
        b"\x86.",
        b"h\x05.",
        b"c_codecs\nencode\n" + b"X\x01\x00\x00\x00a" + b")" + b"\x85" * 100_000 + b"\x86R.",  # deeply nested tuples
        b"]q\x00" + b"(" * 100_000 + b"e",
    ],
)
def test_damaged_and_hostile_files_end_in_one_line(tmp_path, data):
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UserError, match="not a verification set"):
        read_bin(tmp_path / "a.bin")


def test_pairs_of_a_set_come_in_ten_neighbouring_folds_with_their_images(tmp_path, photos):
    faces = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    contents = [faces[i % len(faces)] for i in range(40)]
    contents[3] = b"no image"
    pairs = read_pairs(write(tmp_path / "lfw.bin", (contents, FLAGS), 2))
    assert pairs.same.tolist() == FLAGS
    assert pairs.fold.tolist() == [i // 2 for i in range(20)]
    assert (pairs.left.tolist(), pairs.right.tolist()) == ([*range(0, 40, 2)], [*range(1, 40, 2)])
    images, failed, _ = read_images(None, pairs, 112)
    assert failed == {"lfw.bin[3]": "unknown image format"}
    assert np.array_equal(images[30], images[0])
    part = read_images(None, pairs, 112, range(10, 20))
    assert np.array_equal(part.images, images[10:20])


@pytest.mark.fuzz
@given(st.data())
def test_any_change_of_a_set_is_read_or_refused(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.bin", (IMAGES[:4], FLAGS[:2]), data.draw(st.integers(0, 5)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(UserError):
        images, flags = read_bin(path)
        assert len(images) == 2 * len(flags)
        assert all(type(image) is bytes for image in images)
