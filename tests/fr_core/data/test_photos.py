import contextlib
import io

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fr_core.data.crops import encode, make_crop
from fr_core.data.photos import RejectedImage, read_photo, read_rgb

SMOOTH = cv2.resize(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8), (112, 112))
JPEG = encode(SMOOTH)


def encoded(form, image=SMOOTH, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PNG", "PPM", "WEBP"])
def test_formats_without_loss_give_their_pixels(form):
    photo = read_photo(encoded(form, **({"lossless": True} if form == "WEBP" else {})))
    assert np.array_equal(photo.rgb, SMOOTH)
    assert not photo.as_stored


def test_the_first_frame_of_a_gif_is_read():
    assert np.abs(read_rgb(encoded("GIF")).astype(int) - SMOOTH).mean() < 20


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_keep_their_upper_8(form):
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    out = io.BytesIO()
    Image.fromarray(grey).save(out, form)
    assert np.abs(read_rgb(out.getvalue())[..., 1].astype(int) - (grey >> 8)).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_eight_bits_in_a_wider_file_are_not_black(form):
    grey = SMOOTH[..., 0]
    for values in (
        grey.astype(np.uint16),
        grey.astype(np.int32),
        grey.astype(np.float32),
        grey.astype(np.float32) / 255,
    ):
        if form == "PNG" and values.dtype != np.uint16:
            continue
        out = io.BytesIO()
        Image.fromarray(values).save(out, form)
        assert np.abs(read_rgb(out.getvalue())[..., 2].astype(int) - grey).max() <= 1
    colours = cv2.imencode(f".{form.lower()}", SMOOTH[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(read_rgb(colours).astype(int) - SMOOTH).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_of_png_become_rgb(mode):
    image = Image.fromarray(SMOOTH).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    if mode == "RGBA":
        image.putalpha(Image.fromarray(SMOOTH[..., 0]))
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    plain = image.convert("RGB") if mode in ("1", "L", "P") else image.convert("RGBA").convert("RGB")
    for data in (out.getvalue(), out.getvalue() + bytes(50)):
        assert np.abs(read_rgb(data).astype(int) - np.asarray(plain)).max() <= 1


def test_the_first_frame_of_a_moving_webp_is_read():
    out = io.BytesIO()
    Image.fromarray(SMOOTH).save(
        out, "WEBP", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)], lossless=True
    )
    assert np.array_equal(read_rgb(out.getvalue()), SMOOTH)


def test_cmyk_is_read_in_colour():
    out = io.BytesIO()
    Image.fromarray(SMOOTH).convert("CMYK").save(out, "JPEG", quality=95)
    assert np.abs(read_rgb(out.getvalue()).astype(int) - SMOOTH).mean() < 12


def test_heic_and_avif_name_the_mend():
    with pytest.raises(RejectedImage, match="HEIC or AVIF: convert it to JPEG"):
        read_photo(b"\0\0\0\x18ftypheic" + bytes(100))


def test_a_jpeg_without_an_end_or_with_extra_bytes_is_repaired():
    """Every image whose pixels are all there is kept, whatever its last byte is; crops of it are encoded anew."""
    for seed in range(40):
        whole = encode(cv2.resize(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8), (112, 112)))
        photo = read_photo(whole[:-2])
        assert photo.repaired
        assert np.array_equal(photo.rgb, simplejpeg.decode_jpeg(whole, colorspace="RGB"))
    extra = JPEG[:20] + b"\1\2\3" + JPEG[20:]
    for data in (JPEG[:-2], extra):
        crop = make_crop(data, 112)
        assert crop.repaired
        assert np.abs(read_rgb(crop.jpeg).astype(int) - SMOOTH).mean() < 4
    assert not read_photo(JPEG + bytes(500)).repaired


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_an_image_that_is_cut_off_is_rejected(form):
    data = encoded(form)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(RejectedImage, match=r"corrupt or truncated|unknown image format"):
            read_rgb(data[: int(share * len(data))])


def test_a_huge_image_is_rejected_by_its_header():
    for form in ("BMP", "PPM"):
        data = bytearray(encoded(form))
        if form == "BMP":
            data[18:26] = (100_000).to_bytes(4, "little") * 2
        else:
            data = b"P6\n100000 100000\n255\n" + bytes(data[15:])
        with pytest.raises(RejectedImage, match="more than 64 megapixels"):
            read_rgb(bytes(data))


@pytest.mark.parametrize("shape", [(1, 1), (7, 200), (200, 7)])
def test_images_of_a_few_pixels_make_no_crop(shape):
    for form in ("PNG", "JPEG"):
        with pytest.raises(RejectedImage, match="smaller than 8 pixels"):
            make_crop(encoded(form, SMOOTH[: shape[0], :1].repeat(shape[1], 1)), 112)


def test_what_lies_in_place_of_an_image_is_named():
    with pytest.raises(RejectedImage, match="a Git LFS pointer, not the file itself: run git lfs pull"):
        read_rgb(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(RejectedImage, match="a web page, not the file itself: download it again"):
        read_rgb(b"\n<!DOCTYPE html><html>404</html>")


FORMS = {form: encoded(form) for form in ("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF")}


@pytest.mark.fuzz
@given(
    form=st.sampled_from(sorted(FORMS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    end=st.none() | st.floats(0, 1),
)
def test_whatever_is_changed_in_an_image_it_is_read_or_rejected(form, edits, end):
    data = bytearray(FORMS[form])
    for place, value in edits:
        data[int(place * len(data))] = value
    with contextlib.suppress(RejectedImage):
        rgb = read_rgb(bytes(data if end is None else data[: int(end * len(data))]))
        assert rgb.dtype == np.uint8
        assert rgb.shape[2:] == (3,)
