"""Requests that another page in the browser sends to a server on the loopback address, told by their headers.

Ports are not a boundary for a browser: any page can send requests to any of them, with the cookies of every server on
the host, and names of other hosts can be made to lead here (DNS rebinding).
"""

import re
from collections.abc import Mapping

LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


def refusal(method: str, path: str, headers: Mapping[str, str], origin: str | None = None) -> str | None:
    """Say why a request is not one of the server's own pages or of a program; None if it is.

    A link on another page may open the server's first page, ``/``, and nothing else.

    Args:
        method: GET, POST …
        path: Path of the address.
        headers: By their names in lower case; several of a name joined by a comma.
        origin: Of the pages, https://HOST or http://HOST:PORT, behind a reverse proxy; loopback names
            count, too.
    """
    host, own = headers.get("host", ""), [origin] if origin else []
    if LOOPBACK_HOST.fullmatch(host):
        own.append(f"http://{host.lower()}")
    elif origin is None or host.lower() != origin.partition("//")[2]:
        return f"this server is not at the host name {host!a}"
    if (asker := headers.get("origin")) is not None and asker not in own:
        return f"the page is of another origin, {asker!a}"
    opens_first_page = (
        method in ("GET", "HEAD")
        and path == "/"
        and headers.get("sec-fetch-mode", "navigate") == "navigate"
        and headers.get("sec-fetch-dest", "document") == "document"
    )
    if asker is not None or opens_first_page:
        return None
    if (site := headers.get("sec-fetch-site")) is not None:
        return None if site in ("same-origin", "none") else f"the page is of another origin ({site!a})"
    referer = headers.get("referer")
    if referer is None or referer.startswith(tuple(f"{each}/" for each in own)):
        return None
    return "the page is of another origin (by its Referer)"
