"""Download the files of a data set: checksums are verified, and either all files appear or none."""

import gzip
import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from harness.errors import UserError, warn_loudly
from harness.files import replacing

TIMEOUT = 4.0  # seconds in which a server has to answer before a download is tried
Sources = list[tuple[Path, str, str]]  # of each file: its path, URL, and checksum (MD5 or SHA-256)


def has_files(
    name: str,
    files: list[Path],
    data_dir: str,
    sources: Callable[[], Sources],
    optional: bool,
) -> bool:
    """Whether the `files` of a data set are in `data_dir`; missing ones are downloaded.

    `sources` is called only if files are missing. A checksum is that of the published file; .gz
    files are uncompressed afterwards, and those that are there are not downloaded. If that fails,
    an `optional` data set causes a loud warning, any other one a `UserError`.
    """
    if Path(data_dir).is_file():
        raise UserError(f"--data_dir {data_dir} is a file: pass a directory")
    missing = ", ".join(file.name for file in files if not file.exists())
    if not missing:
        return True
    try:
        _download(sources())
        return True
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = one_line(error)
    problem = f"{name} is not in {data_dir}: {missing} missing, and can't be downloaded: {reason}"
    advice = f"put the published files into {files[0].parent}, or pass another --data_dir"
    if not optional:
        raise UserError(f"{problem}; {advice}, or use --dataset synthetic")
    warn_loudly(
        f"{problem}.",
        "This run uses the BUILT-IN synthetic data instead: "
        f"its metrics are not comparable to those of {name}.",
        f"To use {name}, {advice}.",
    )
    return False


def _download(sources: Sources) -> None:
    """Raises OSError, HTTPException, or ValueError for a bad URL, redirection or checksum."""
    contents = {}
    for path, url, checksum in sources:
        if path.exists():
            continue
        published = path.with_name(url.rpartition("/")[2])
        if published.exists():  # the user has put it there
            url = published.resolve().as_uri()
        elif problem := why_unreachable(url):
            raise ValueError(problem)
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        algorithm = "md5" if len(checksum) == 32 else "sha256"
        if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != checksum:
            raise ValueError(f"{url} is not the published file ({algorithm} checksum)")
        contents[path] = gzip.decompress(content) if url.endswith(".gz") else content
    for path, content in contents.items():  # not before all of them have arrived
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def one_line(text: object) -> str:
    """The message of an exception, or any other text, in one line."""
    if isinstance(text, http.client.HTTPException):
        return repr(text)  # its message may be only what the server sent
    message = getattr(text, "reason", text)
    return " ".join(str(message).split())


def why_unreachable(url: str) -> str | None:
    """Why the server of `url` does not answer, or None if it does. An HTTP error is an answer."""
    outcomes = [f"{url}: no answer within {TIMEOUT:g} s"]

    def probe() -> None:
        problem = None
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass
        except Exception as error:  # any: URL and proxy may come from the environment
            problem = f"{one_line(url)}: {one_line(error)}"
        outcomes.append(problem)

    # In a thread, because the timeout of urlopen does not cover the DNS lookup.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return outcomes[-1]
