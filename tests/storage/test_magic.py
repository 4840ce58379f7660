"""Files that are not what their names say, as cameras, browsers, servers and git write them."""

import io

import pytest
from PIL import Image

from storage.images.transforms import UnreadableImage, decode, inspect
from storage.magic import not_an_image, stand_in

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PAGES = [
    b"<!DOCTYPE html>\n<html lang=en><title>404</title>",
    b"\xef\xbb\xbf\r\n <!doctype HTML>",
    b"<HTML><HEAD>",
    b'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html PUBLIC "x">\n<html xmlns="x">',
]
ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'


def box(brand: bytes, *others: bytes) -> bytes:
    """The first box of an ISO base media file."""
    return (16 + 4 * len(others)).to_bytes(4) + b"ftyp" + brand + bytes(4) + b"".join(others) + bytes(99)


FORMATS = {
    "AVIF": [box(b"avif"), box(b"avis"), box(b"mif1", b"mif1", b"avif", b"miaf")],
    "HEIC": [box(b"heic"), box(b"heix"), box(b"hevc"), box(b"mif1", b"heic")],
    "JPEG 2000": [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0\x29"],
    "JPEG XL": [b"\xff\x0a\x7f\x90", b"\0\0\0\x0cJXL \r\n\x87\n"],
    "JPEG-LS": [b"\xff\xd8\xff\xf7\0\x0b\x08"],
    "a camera's raw format": [
        box(b"crx "),
        b"FUJIFILMCCD-RAW 0201",
        b"IIU\0\x18\0",
        b"IIRO\x08",
    ],
    "Photoshop's format": [b"8BPS\0\x01"],
    "SVG": [
        b'<svg xmlns="http://www.w3.org/2000/svg">',
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<svg width="1">',
    ],
    "PDF": [b"%PDF-1.4\n"],
    "DICOM": [bytes(128) + b"DICM\x02\0"],
    "NumPy's format": [b"\x93NUMPY\x01\0"],
}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, all_data in FORMATS.items() for data in all_data])
def test_a_format_that_is_not_supported_is_named(name: str, data: bytes) -> None:
    with pytest.raises(UnreadableImage, match=rf"^{name} is not supported \(convert it to PNG or JPEG\)$"):
        inspect(data)


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000"])
def test_what_pillow_writes_is_named(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, form)
    with pytest.raises(UnreadableImage, match=r"^(AVIF|JPEG 2000) is not supported"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_supported_formats_are_nothing_else(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, form)
    assert not_an_image(buffer.getvalue()) is None


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (POINTER, r"a Git LFS pointer, not the file itself \(run `git lfs pull`\)"),
        *((page, r"an HTML page, not the file itself \(fetch it again\)") for page in PAGES[:3]),
        (ERROR, r"a server's error message, not the file itself \(fetch it again\)"),
        *((data, "a video, not an image") for data in (box(b"isom"), box(b"qt  "), b"\x1aE\xdf\xa3\x93")),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "metadata of macOS, not an image"),
        (b"{'no': 'image'}", "not an image"),
        (b"", "empty file"),
    ],
)
def test_what_was_saved_in_the_place_of_an_image_is_named(data: bytes, what: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^{what}$"):
        inspect(data)


@pytest.mark.parametrize("page", PAGES)
def test_pages_stand_in(page: bytes) -> None:
    assert "not the file itself (fetch it again)" in str(stand_in(page))


def tiff(**tags: int) -> bytes:
    """A picture with tags of raw photographs; its pixels are those of a preview."""
    numbers = {"subfile_type": 254, "dng_version": 50706}
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "TIFF", tiffinfo={numbers[name]: value for name, value in tags.items()})
    return buffer.getvalue()


def test_a_raw_photograph_is_not_its_preview() -> None:
    assert inspect(tiff(subfile_type=0)).extension == inspect(tiff(subfile_type=2)).extension == "tif"
    plain = tiff()
    assert plain[4:8] == b"\x08\0\0\0"  # its directory is behind its header, where Canon has a mark; so move it
    canon = plain[:4] + len(plain).to_bytes(4, "little") + b"CR\x02\0" + plain[12:] + plain[8:]
    assert Image.open(io.BytesIO(canon)).size == (16, 16)
    for data in (tiff(subfile_type=1), tiff(dng_version=1), canon):
        with pytest.raises(UnreadableImage, match="a camera's raw format is not supported"):
            inspect(data)
