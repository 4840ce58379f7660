"""What a file is by its first bytes, if it is not what it should be.

Signatures are those of the formats' specifications.
"""

import re

HEAD = 1024
"""Bytes at the beginning of a file that are enough to tell."""

RAW = "a camera's raw format"

_AGAIN = "not the file itself (fetch it again)"
_XML = rb"(<\?xml [^>]*>\s*)?"
_STAND_INS = {
    "a Git LFS pointer, not the file itself (run `git lfs pull`)": rb"version https://git-lfs\.github\.com/spec/",
    f"an HTML page, {_AGAIN}": _XML + rb"(?i:<(!doctype html|html|head|body|script))\b",
    f"a server's error message, {_AGAIN}": _XML + rb"<(Error|\w+:Envelope)\b",
}
_SUPPORTED = rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*|P[1-6]\s"
_IMAGES = {
    "AVIF": rb".{4}ftyp(avi[fs]|(mif1|msf1).{4}(.{4}){0,9}avi[fs])",
    "HEIC": rb".{4}ftyp(he[iv][cxms]|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "JPEG XR": rb"II\xbc",
    "JPEG-LS": rb"\xff\xd8\xff\xf7",
    RAW: rb".{4}ftypcrx |II\*\0.{4}CR|FUJIFILMCCD-RAW|IIU\0|IIR[OS]\x08|MMOR\0|\0MRM|FOVb",
    "Photoshop's format": rb"8BPS",
    "GIMP's format": rb"gimp xcf",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?R",
    "QOI": rb"qoif",
    "DDS": rb"DDS ",
    "ICO": rb"\0\0[\x01\x02]\0[^\0]",
    "DICOM": rb".{128}DICM",
    "FITS": rb"SIMPLE  =",
    "NumPy's format": rb"\x93NUMPY",
    "HDF5": rb"\x89HDF\r\n\x1a\n",
    "PDF": rb"%PDF-",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "SVG": rb"\s*(\xef\xbb\xbf\s*)?(<\?xml .*|<!--.*|<!DOCTYPE )?<?svg\b",
}
_OTHERS = {
    "a video": rb".{4}(ftyp|moov)|\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01\xba",
    "a zip": rb"PK\x03\x04",
    "gzip": rb"\x1f\x8b",
    "metadata of macOS": rb"\0\x05\x16[\0\x07]",
}


def stand_in(head: bytes) -> str | None:
    """What stands in the place of a file that was not fetched, and what to do; None if this seems to be a file.

    Args:
        head: the first `HEAD` bytes of the file, or more.
    """
    return _first(_STAND_INS, head.removeprefix(b"\xef\xbb\xbf").lstrip())


def not_an_image(head: bytes) -> str | None:
    """Why a file is not an image of a supported format, in a few words; None if this is not known.

    Args:
        head: the first `HEAD` bytes of the file, or more.
    """
    if (instead := stand_in(head)) is not None:
        return instead
    if (name := _first(_IMAGES, head)) is not None:
        return unsupported(name)
    other = _first(_OTHERS, head)
    return f"{other}, not an image" if other else None


def begins_as_image(head: bytes) -> bool:
    """Whether a file begins as an image of any format, supported or not.

    Args:
        head: the first `HEAD` bytes of the file, or more.
    """
    return re.match(_SUPPORTED, head, re.DOTALL) is not None or _first(_IMAGES, head) is not None


def unsupported(name: str) -> str:
    """That a format is not supported, in a few words."""
    return f"{name} is not supported (convert it to PNG or JPEG)"


def _first(patterns: dict[str, bytes], head: bytes) -> str | None:
    found = (name for name, pattern in patterns.items() if re.match(pattern, head[:HEAD], re.DOTALL))
    return next(found, None)
