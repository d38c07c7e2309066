"""Check quickly whether a server can be reached, before a download is attempted."""

import threading
import urllib.error
import urllib.parse
import urllib.request


def why_unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why the server of `url` does not answer within `seconds`, or None if it does; an HTTP error is an answer."""
    host = urllib.parse.urlsplit(url).hostname
    outcome = [f"no answer from {host} within {seconds:g} s"]

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            outcome[0] = None
        except urllib.error.HTTPError:
            outcome[0] = None
        except OSError as error:
            outcome[0] = f"{host}: {getattr(error, 'reason', error)}"

    # In a thread, because the timeout of urlopen does not cover the DNS lookup.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]
