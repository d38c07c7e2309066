"""What downloads share: a quick check that the server can be reached, and what can go wrong, in one line."""

import http.client
import threading
import urllib.error
import urllib.parse
import urllib.request

DOWNLOAD_ERRORS = (OSError, http.client.HTTPException, ValueError)  # the last after a redirection to no URL


def reason(error: Exception) -> str:
    """Why a download failed, in one line."""
    if isinstance(error, http.client.HTTPException):
        return repr(error)  # its text may be no more than what the server sent
    return " ".join(str(getattr(error, "reason", error)).split())


def why_unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why the server of `url` does not answer within `seconds`, or None if it does; an HTTP error is an answer."""
    try:
        host = urllib.parse.urlsplit(url).hostname
    except ValueError:
        host = None
    if not host:
        return f"{url!r} is not the URL of a server"
    outcome = [f"no answer from {host} within {seconds:g} s"]

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            outcome[0] = None
        except urllib.error.HTTPError:
            outcome[0] = None
        except Exception as error:  # any: URL and proxy may come from the environment
            outcome[0] = f"{host}: {reason(error)}"

    # In a thread, because the timeout of urlopen does not cover the DNS lookup.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]
