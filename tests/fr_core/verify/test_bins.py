import contextlib
import pickle
import pickletools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fr_core.data.pickled_calls import CALLS
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


PROTOCOLS = [0, 1, 2, 3, 4, 5]
FLAG_FORMS = {
    "numpy flags": lambda: [np.bool_(flag) for flag in FLAGS],
    "numpy numbers": lambda: [kind(flag) for flag, kind in zip(FLAGS, [np.int64, np.float32] * 10, strict=True)],
    "an array of flags": lambda: np.array(FLAGS),
    "an array of bytes": lambda: np.array(FLAGS, np.uint8),
    "an array of big-endian numbers": lambda: np.array(FLAGS, ">i4"),
    "an array of objects": lambda: np.array(FLAGS, object),
    "a strided array": lambda: np.repeat(FLAGS, 2)[::2],
    "a tuple": lambda: tuple(FLAGS),
    "floats": lambda: [float(flag) for flag in FLAGS],
}
IMAGE_FORMS = {
    "bytearrays": lambda: [bytearray(image) for image in IMAGES],
    "arrays of bytes": lambda: [np.frombuffer(image, np.uint8) for image in IMAGES],
    "own arrays of bytes": lambda: [np.frombuffer(image, np.uint8).copy() for image in IMAGES],
    "arrays of one text": lambda: [np.array(image) for image in IMAGES],
    "numpy texts": lambda: [np.bytes_(image) for image in IMAGES],
    "an array of texts": lambda: np.array(IMAGES),
    "an array of objects": lambda: np.array(IMAGES, object),
    "an array of arrays": lambda: array_of([np.frombuffer(image, np.uint8) for image in IMAGES]),
}


def array_of(values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", FLAG_FORMS)
def test_flags_in_each_form_that_numpy_gives_them(tmp_path, form, protocol):
    assert read_bin(write(tmp_path / "a.bin", (IMAGES, FLAG_FORMS[form]()), protocol)) == (IMAGES, FLAGS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_images_in_each_form_that_numpy_gives_them(tmp_path, form, protocol):
    assert read_bin(write(tmp_path / "a.bin", (IMAGE_FORMS[form](), FLAGS), protocol)) == (IMAGES, FLAGS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_both_in_one_array(tmp_path, protocol):
    both = array_of([IMAGES, FLAGS])
    assert read_bin(write(tmp_path / "a.bin", both, protocol)) == (IMAGES, FLAGS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_numpy_1_wrote(tmp_path, protocol):
    """It calls its module ``core``; since protocol 4 a byte before the name says how long it is."""
    path = write(tmp_path / "a.bin", (IMAGE_FORMS["arrays of bytes"](), FLAG_FORMS["numpy flags"]()), protocol)
    data = path.read_bytes()
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        for size in ([len(name)], []) if protocol >= 4 else ([],):
            data = data.replace(bytes(size) + name, bytes(length - 1 for length in size) + name.replace(b"_", b""))
    assert b"_core" not in data
    path.write_bytes(data)
    assert read_bin(path) == (IMAGES, FLAGS)


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
        (np.zeros(3), "expected images and flags"),
        ((np.zeros((2, 4), np.uint8), [True]), "a numpy array of 2 dimensions"),
        (([b"a", b"b"], np.zeros(1, "M8[s]")), "numpy values of the type M8"),
        (([b"a", b"b"], np.zeros(1, [("a", "i4")])), "numpy values of the type V4"),
        (([b"a", b"b"], np.ma.zeros(1)), "it would run numpy.ma.core _mareconstruct"),
        (([b"a", b"b"], np.random.default_rng()), "it would run numpy.random"),
        (([b"a", b"b"], [float("nan")]), "expected a list of flags"),
        (([b"a", b"b"], ["1"]), "expected a list of flags"),
        (([np.arange(3), np.arange(3)], [True]), "expected a list of encoded images"),
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
        b"]q\x00h\x00\x93.",  # a name that is a list
        b"cnumpy\ndtype\n)R.",
        b"cnumpy\ndtype\nU\x02i4\x85R}b.",
        b"cnumpy\ndtype\nU\x02O8\x85R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb(.",
        b"cnumpy.core.multiarray\n_reconstruct\n)Rq\x00h\x00b.",  # filled with itself
        b"cnumpy.core.multiarray\n_reconstruct\n)\x81.",
        b"cnumpy\nndarray\n)R.",
        b"c_codecs\nencode\nq\x00X\xe8\x03\x00\x00"
        + b"a" * 1000
        + b"q\x01U\x06latin1\x86q\x02"
        + b"h\x00h\x02R" * 1000
        + b".",  # the same bytes again and again
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
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


def read_or_refuse(path):
    with contextlib.suppress(UserError):
        images, flags = read_bin(path)
        assert len(images) == 2 * len(flags)
        assert all(type(image) is bytes for image in images)
        assert all(type(flag) is bool for flag in flags)


@pytest.mark.fuzz
@given(data=st.data(), images=st.sampled_from([*IMAGE_FORMS]), flags=st.sampled_from([*FLAG_FORMS]))
def test_any_change_of_a_set_is_read_or_refused(tmp_path_factory, data, images, flags):
    content = IMAGE_FORMS[images]()[:4], FLAG_FORMS[flags]()[:2]
    path = write(tmp_path_factory.mktemp("fuzz") / "a.bin", content, data.draw(st.sampled_from(PROTOCOLS)))
    written = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        written[data.draw(st.integers(0, len(written) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(written[: data.draw(st.integers(0, len(written)))] if data.draw(st.booleans()) else written)
    read_or_refuse(path)


PIECES = [
    *(b"c" + name.replace(" ", "\n").encode() + b"\n" for name in CALLS),
    *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes if not opcode.arg),
    *(
        b"U" + bytes([len(text)]) + text
        for text in (b"i4", b"u1", b"O8", b"S3", b"|", b"<", b"C", b"latin1", b"\0" * 8)
    ),
    *(b"X" + struct.pack("<I", len(text)) + text for text in (b"latin1", b"b1", b"a")),
    *(kind + bytes([value]) for kind in (b"K", b"q", b"h") for value in range(3)),
    b"K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t",
    b"cnumpy\ndtype\nU\x02u1\x85R(K\x03U\x01|NNNK\x00K\x00K\x00tb",
]


@pytest.mark.fuzz
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_program_is_read_or_refused(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("fuzz") / "a.bin"
    path.write_bytes(b"".join(pieces) + b".")
    read_or_refuse(path)
