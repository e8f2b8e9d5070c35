"""``darkroom up | status | down | env``: the servers on this machine."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion.escaping import escape_controls

if TYPE_CHECKING:
    from flows.stack import StackStatus

from flows.cli.options import Json, show


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    panel = "The local stack"
    app.command(rich_help_panel=panel)(up)
    app.command(rich_help_panel=panel)(status)
    app.command(rich_help_panel=panel)(down)
    app.command(rich_help_panel=panel)(env)
    app.command(rich_help_panel="On a team's servers")(health)
    app.command(rich_help_panel="On a team's servers")(metrics)


def _say(line: str) -> None:
    print(escape_controls(line), file=sys.stderr, flush=True)


def _show_status(status: "StackStatus", as_json: bool) -> None:
    lines = [f"{each.title:<16} {each.state:<8} {each.url}" for each in status.services]
    lines += [f"{server:<16} elsewhere, by {variable}" for server, variable in status.elsewhere.items()]
    if status.services:
        lines += [f"logs and data     {status.folder}", f"passwords         {status.credentials}"]
    show(status.model_dump(mode="json"), as_json, lines)


def up(as_json: Json = False) -> None:
    """Start MLflow, Prefect with a worker, and an S3 server, on loopback; what runs already is left alone.

    Example:  darkroom up && eval "$(darkroom env)"
    """
    from flows.stack import up

    _show_status(up(_say), as_json)


def status(as_json: Json = False) -> None:
    """Show the local servers: where they are, whether they answer, where their logs and passwords lie."""
    from flows.stack import status

    _show_status(status(), as_json)


def down() -> None:
    """Stop the local servers; everything they hold is kept for the next `darkroom up`."""
    from flows.stack import down

    down(_say)


def env() -> None:
    """Print the exports with which any client on this machine joins the stack.

    Example:  eval "$(darkroom env)"
    """
    from flows.stack import exports

    for line in exports():
        print(line)


def health(
    servers: Annotated[list[str], typer.Argument(help="mlflow, prefect, s3, or a http:// address that has to answer.")],
) -> None:
    """Ask servers that the environment names as a client would; exit code 1 and a line that says what is wrong.

    What an S3 server lacks that not everything needs is a line, too.

    Example:  darkroom health mlflow prefect s3
    """
    from flows.health import check

    for server in servers:
        for line in check(server):
            print(line)


def metrics(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 9464,
) -> None:
    """Serve what Prefect, MLflow and the ledger know of queues, failures, champions and rates, for Prometheus to fetch.

    Example:  darkroom metrics & curl localhost:9464/metrics
    """
    from flows.environment import join

    join("prefect", "mlflow", "s3")
    from flows.metrics import serve

    serve(host, port)
