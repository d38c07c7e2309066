"""Download published files: from a server that answers quickly, verified by a checksum, all or none."""

import gzip
import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from harness.errors import UserError, warn_loudly
from harness.files import replacing


def has_files(
    name: str,
    files: list[Path],
    data_dir: str,
    sources: Callable[[], Mapping[Path, tuple[str, str]]],
    optional: bool,
) -> bool:
    """Whether the `files` of a data set are in `data_dir`, if need be after a download.

    `sources` gives for each file its URL and a checksum, MD5 or SHA-256, of what is sent; .gz is uncompressed.
    If files are missing, it is a loud warning if the data set is `optional`, else a `UserError`.
    """
    if Path(data_dir).is_file():
        raise UserError(f"--data_dir {data_dir} is a file: pass a directory")
    missing = ", ".join(file.name for file in files if not file.exists())
    try:
        if missing:
            _download(sources())
        return True
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
    ) as error:  # the last after a redirection to no URL
        problem = f"{name} is not in {data_dir}: {missing} missing, and can't be downloaded: {one_line(error)}"
    advice = f"put the uncompressed files into {files[0].parent}, or pass another --data_dir"
    if not optional:
        raise UserError(f"{problem}; {advice}, or use --dataset synthetic")
    stand_in = "This run uses the BUILT-IN synthetic data instead: its metrics are not comparable to those of"
    warn_loudly(f"{problem}.", f"{stand_in} {name}.", f"To use {name}, {advice}.")
    return False


def _download(sources: Mapping[Path, tuple[str, str]]) -> None:
    if problem := why_unreachable(next(iter(sources.values()))[0]):
        raise ValueError(problem)
    contents = {}
    for path, (url, checksum) in sources.items():
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        algorithm = "md5" if len(checksum) == 32 else "sha256"
        if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != checksum:
            raise ValueError(f"what the server sent is not the published file: {url}")
        contents[path] = gzip.decompress(content) if url.endswith(".gz") else content
    for path, content in contents.items():  # once all have arrived
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def one_line(text: object) -> str:
    """What an exception or another object says, in one line."""
    if isinstance(text, http.client.HTTPException):
        return repr(text)  # its text may be no more than what the server sent
    return " ".join(str(getattr(text, "reason", text)).split())


def why_unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why the server of `url` does not answer within `seconds`, or None if it does; an HTTP error is an answer."""
    if not url.startswith(("http://", "https://")):
        return f"{url!r} is not the URL of a server"
    outcome = [f"{url}: no answer within {seconds:g} s"]

    def probe() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=seconds
            ).close()
            outcome[0] = None
        except Exception as error:  # any: URL and proxy may come from the environment
            answered = isinstance(error, urllib.error.HTTPError)
            outcome[0] = None if answered else f"{one_line(url)}: {one_line(error)}"

    # In a thread, because the timeout of urlopen does not cover the DNS lookup.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]
