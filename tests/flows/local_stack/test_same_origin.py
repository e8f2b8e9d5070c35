"""Which requests are of a server's own pages, by what browsers send."""

import pytest

from flows.local_stack.same_origin import refusal

OWN = {"host": "127.0.0.1:7860"}
PROXIED = {"host": "studio.example.org"}
PUBLIC = "https://studio.example.org"


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/config", OWN),  # a program
        ("GET", "/config", {"host": "LOCALHOST:8000"}),  # forwarded by SSH
        ("POST", "/login", {"host": "[::1]:7860"}),
        ("POST", "/login", OWN | {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}),
        ("GET", "/", OWN | {"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}),
        # A link on another page.
        (
            "GET",
            "/",
            OWN | {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
        ),
        ("GET", "/", OWN | {"referer": "https://wiki.example.org/studio"}),
        ("GET", "/assets/x.js", OWN | {"sec-fetch-site": "same-origin", "referer": "http://127.0.0.1:7860/"}),
        ("GET", "/assets/x.js", OWN | {"referer": "http://127.0.0.1:7860/"}),
    ],
)
def test_own_pages_and_programs_are_answered(method: str, path: str, headers: dict[str, str]) -> None:
    assert refusal(method, path, headers) is None


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        # DNS rebinding, and what looks like a name that is allowed.
        *[
            ("GET", "/", {"host": host})
            for host in (
                "evil.example:7860",
                "127.0.0.1.evil.example",
                "localhost.evil.example",
                "evil@127.0.0.1",
                "127.0.0.1:7860, evil.example",
                "[::1",
                "",
            )
        ],
        ("GET", "/", {}),
        *[
            (method, "/config", OWN | {"origin": origin})
            for method in ("GET", "POST", "OPTIONS")
            for origin in (
                "http://127.0.0.1:9999",
                "http://localhost:7860",
                "https://127.0.0.1:7860",
                "http://127.0.0.1:7860.evil.example",
                "null",
                "",
            )
        ],
        # Neither Origin nor a simple link: an image, a frame, a script, a navigation elsewhere.
        *[
            ("GET", path, OWN | {"sec-fetch-site": site, "sec-fetch-mode": mode, "sec-fetch-dest": dest})
            for path, mode, dest in (
                ("/logout", "no-cors", "image"),
                ("/logout", "navigate", "document"),
                ("/", "no-cors", "script"),
                ("/", "navigate", "iframe"),
            )
            for site in ("same-site", "cross-site", "anything")
        ],
        (
            "POST",
            "/",
            OWN | {"sec-fetch-site": "same-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
        ),
        # Of browsers that send no Sec-Fetch headers.
        ("GET", "/logout", OWN | {"referer": "http://127.0.0.1:9999/"}),
        ("POST", "/login", OWN | {"referer": "http://127.0.0.1:7860.evil.example/"}),
        ("POST", "/", OWN | {"referer": "http://127.0.0.1:9999/"}),
    ],
)
def test_other_pages_and_host_names_are_refused(method: str, path: str, headers: dict[str, str]) -> None:
    assert refusal(method, path, headers) is not None


@pytest.mark.parametrize(
    ("headers", "is_answered"),
    [
        (PROXIED | {"origin": PUBLIC}, True),
        (OWN | {"origin": PUBLIC}, True),  # a proxy that sends the address it connects to
        (OWN | {"origin": "http://127.0.0.1:7860"}, True),
        (PROXIED | {"origin": "http://studio.example.org"}, False),
        (PROXIED | {"origin": "https://studio.example.org:8443"}, False),
        (PROXIED | {"origin": "http://127.0.0.1:7860"}, False),
        ({"host": "www.example.org", "origin": PUBLIC}, False),
    ],
)
def test_a_reverse_proxy_adds_its_own_origin_alone(headers: dict[str, str], is_answered: bool) -> None:
    assert (refusal("POST", "/login", headers, PUBLIC) is None) == is_answered
