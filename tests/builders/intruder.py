"""What another user of this machine tries on the ports of a stack that is not his: run as a program of its own.

It is given one JSON object on standard input and prints one. Of the stack it knows what ``ss`` and guessing tell: ports
and sockets, which part of SeaweedFS listens where, and the names of a bucket and an object.
"""

import encodings.idna  # noqa: F401  # What sockets load when they are used: nobody may not read it.
import http.client
import json
import os
import pwd
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

PATIENCE = 6.0
"""Seconds after which a client that tries again for ever is given up."""


def drop_privileges() -> None:
    """Give up all rights, if there are any to give up."""
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)


def requests(bucket: str, key: str) -> list[tuple[str, str, str]]:
    """Method, path and body of requests that read, then of those that change, then of those that destroy."""
    reading = [
        *("/", "/status", "/metrics", "/ui/index.html", "/debug/pprof/goroutine?debug=2"),
        *("/dir/status", "/vol/status", "/dir/lookup?volumeId=1", "/dir/assign?count=1"),
        *("/buckets/", f"/buckets/{bucket}/{key}", f"/{bucket}/{key}", f"/{bucket}"),
        *(f"/{volume},0{needle}00000000" for volume in range(1, 3) for needle in range(1, 3)),
        *("/api/users", "/api/config", "/object-store/users", "/object-store/buckets"),
        "/api/2.0/mlflow/experiments/search?max_results=9",
    ]
    return [
        *(("GET", path, "") for path in reading),
        ("POST", "/api/flow_runs/filter", "{}"),
        ("POST", "/api/variables/", json.dumps({"name": "intruder", "value": "x"})),
        ("POST", "/api/2.0/mlflow/experiments/create", json.dumps({"name": "intruder"})),
        ("POST", "/?Action=CreateUser&UserName=intruder", ""),
        ("PUT", f"/buckets/{bucket}/{key}", "overwritten"),
        ("POST", f"/buckets/{bucket}/intruder", "new"),
        ("PUT", f"/{bucket}/{key}", "overwritten"),
        ("POST", "/api/object-store/users", json.dumps({"username": "intruder", "actions": ["Admin"]})),
        ("GET", "/vol/grow?count=1", ""),
        ("DELETE", f"/{bucket}/{key}", ""),
        ("DELETE", f"/buckets/{bucket}/{key}", ""),
        ("DELETE", f"/buckets/{bucket}?recursive=true&ignoreRecursiveError=true", ""),
        ("GET", f"/vol/vacuum?garbageThreshold=0.0001&collection={bucket}", ""),
        ("GET", f"/col/delete?collection={bucket}", ""),
    ]


class Local(http.client.HTTPConnection):
    """A connection to a port or to a socket in the file system, with TLS or without."""

    def __init__(self, place: int | str, tls: bool) -> None:
        super().__init__("127.0.0.1", place if isinstance(place, int) else None, timeout=PATIENCE)
        self.place, self.tls = place, tls

    def connect(self) -> None:
        if isinstance(self.place, int):
            self.sock = socket.create_connection(("127.0.0.1", self.place), PATIENCE)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(PATIENCE)
            self.sock.connect(self.place)
        if self.tls:
            trusting = ssl.create_default_context()
            trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
            self.sock = trusting.wrap_socket(self.sock)


def answers(places: list[int | str], requests: list[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    """Whatever is answered in HTTP; places that cut a connection before they are asked anything bad are left alone."""
    for place in places:
        for tls in (False, True):
            for method, path, body in requests:
                try:
                    yield {"place": place, "tls": tls, "asked": f"{method} {path}"} | ask(
                        place, tls, method, path, body
                    )
                except (OSError, http.client.HTTPException):
                    if (method, path, body) == requests[0]:
                        break


def ask(place: int | str, tls: bool, method: str, path: str, body: str) -> dict[str, Any]:
    """Status and text of one answer."""
    connection = Local(place, tls)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return {"status": answer.status, "said": answer.read(2**16).decode(errors="replace")}
    finally:
        connection.close()


def administration(weed: str, folders: list[str], ports: dict[str, int], bucket: str, key: str) -> list[str]:
    """What SeaweedFS's own programs say, which speak gRPC, run with the ``security.toml`` of each folder, if any."""
    identity = "-user intruder -access_key intruder -secret_key intruder -actions Admin -apply"
    shell = "\n".join(
        (
            f"fs.ls /buckets/{bucket}",
            f"fs.cat /buckets/{bucket}/{key}",
            "collection.list",
            "lock",
            f"s3.configure {identity}",
            f"fs.rm -rf /buckets/{bucket}/{key}",
            f"s3.bucket.delete -name {bucket}",
            f"collection.delete -collection {bucket} -force",
            "unlock",
            "exit",
        )
    )
    master, filer = (f"127.0.0.1:{ports[name]}" for name in ("master", "filer"))
    programs = [
        ([weed, "shell", f"-master={master}", f"-filer={filer}"], shell),
        ([weed, "filer.cat", f"http://{filer}/buckets/{bucket}/{key}"], ""),
    ]
    running = []
    for folder in folders:
        for command, message in programs:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"HOME": folder, "PATH": os.defpath},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            running.append((process, message))
    findings = []
    for process, message in running:
        try:
            output, _ = process.communicate(message.encode(), timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        findings.append(output.decode(errors="replace"))
    return findings


def main() -> None:
    """Try everything, as nobody."""
    arguments = json.load(sys.stdin)
    drop_privileges()
    bucket, key = arguments["bucket"], arguments["key"]
    readable = [path for path in arguments["paths"] if os.access(path, os.R_OK)]
    findings = list(answers(arguments["places"], requests(bucket, key)))
    outputs = administration(arguments["weed"], arguments["folders"], arguments["ports"], bucket, key)
    print(json.dumps({"user": os.geteuid(), "answers": findings, "programs": outputs, "readable": readable}))


if __name__ == "__main__":
    main()
