"""URLs as text: their parts, what of them may be shown, and which are refused. Import them from `storage.uri`."""

import re
from typing import Any

_SECRET_QUERY = re.compile(
    r"[?&]([^=&#]*(?:signature|credential|secret|token|passw|key)[^=&#]*|sig|pwd|auth)=", re.IGNORECASE
)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def join(url: str, *parts: str) -> str:
    """The URL of an object below a folder.

    Examples:
        >>> join("s3://lab/runs", "train", "0123456789abcdef")
        's3://lab/runs/train/0123456789abcdef'
    """
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def parent(url: str) -> str:
    """The URL of the folder that holds an object or folder."""
    return url.rpartition("/")[0] or ("/" if url.startswith("/") else ".")


def name(url: str) -> str:
    """The last part of a URL."""
    return url.rstrip("/").rpartition("/")[2]


def chain(url: str) -> tuple[str, str]:
    """What stands before the last part of a chained URL such as ``zip://folder::/data/x.zip``, and that part.

    The first is empty if the URL is no chain; in a path ``::`` is a part of the name.
    """
    before, _, last = url.rpartition("::") if "://" in url else ("", "", url)
    return before, last


def redact(url: str) -> str:
    """The URL without user, password and query, to be shown in logs and stored in manifests.

    Outside the web ``?`` and ``#`` are parts of names, unless a value follows, as in ``?versionId=1``.

    Examples:
        >>> redact("https://me:secret@host/vae?token=abc")
        'https://host/vae'
    """
    if "://" not in url:
        return url
    query = r"[?#].*" if re.search(r"\bhttps?://", url) else r"[?#][^/]*=.*"
    return re.sub(query, "", re.sub(r"://[^/\s]*@", "://", url), flags=re.DOTALL)


def redact_json(value: Any) -> Any:
    """A JSON value with `redact` applied to every string."""
    if isinstance(value, dict):
        return {redact_json(key): redact_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_json(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """The text in one line, with an escape sequence for each character that no terminal shows."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def checked(url: str) -> str:
    """The URL itself, checked to contain no secret, since parameters, logs and errors are shown and stored openly.

    Raises:
        ValueError: it has a user or password, or a signature or key in its query; it is empty, can be read in two
            ways, or cannot be printed.
    """
    if not url:
        raise ValueError("the name is empty")
    query = _SECRET_QUERY.search(url) if "://" in url else None
    if re.search(r"://[^/]*@", url) or query:
        where = f" ({query[1]} in its query)" if query else ""
        raise ValueError(f"the URL contains credentials{where}; set them in the environment or in fsspec's config")
    if _UNPRINTABLE.search(url):
        raise ValueError("the name has a line break or another character that cannot be printed; rename it")
    if re.search(r"(^|::)file://.*[%?#]", url):
        raise ValueError("%, ? and # in a file URL can be read in two ways; write the path without file://")
    if re.match(r"[a-z][a-z0-9+.-]*:/(?!/)", url):
        raise ValueError("one slash after the colon; a URL has ://, and a folder of this name needs ./ before it")
    return url
