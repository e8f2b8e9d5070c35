"""Signatures: ``darkroom sign`` and ``darkroom verify``."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import require_writable
from flows.cli.arguments import check_image
from flows.cli.command import Certificates, CommandOutput, SigningKeyFile, command, connect, display_progress

if TYPE_CHECKING:
    from flows.provenance.verify import Check

app = typer.Typer()


class VerificationError(ConflictError):
    """Something is not what its signer signed."""


@command(app, panel="Provenance")
def sign(
    what: Annotated[str, Argument(metavar="BATCH|FOLDER", help="URI of a sampling batch, or folder of edits.")],
    out: Annotated[str, Option(metavar="FOLDER|URI", help="Folder or S3 address of the signed copies.")],
    prompts: Annotated[bool, Option("--prompts", help="Say the prompts; default: they are left out.")] = False,
    parent: Annotated[
        Path | None, Option(metavar="FILE", help="The image that was edited, as an ingredient.", callback=check_image)
    ] = None,
    key: SigningKeyFile = None,
    certificates: Certificates = None,
) -> CommandOutput:
    """Sign copies of generated images with C2PA: made by a model, which one, and from which data.

    The images stay as they are, and each gets one copy. The same command goes on where it was stopped.

    Example:  darkroom sign s3://darkroom/samples/faces/3/seed7-count64-dpmpp_2m_sde16-af14cd24 --out signed/faces

    Example:  darkroom sign samples/variations --parent face.png --out signed/variations --key signing.key
    """
    from flows.signing.keys import SigningKey

    if not out.startswith("s3://"):
        require_writable(Path(out), f"--out {out}")
    signer = SigningKey.load(key, certificates)
    with connect("s3") if "s3://" in f"{what} {out}" else nullcontext(), display_progress() as progress:
        from flows.provenance.signed_images import sign_images

        result = sign_images(what, out, signer, prompts, parent, progress)
    note = f", {result.images - result.signed:,} of them before" if result.signed < result.images else ""
    return CommandOutput(result, [f"{result.out}: {result.images:,} signed copies by {result.signer}{note}"])


@command(app, panel="Provenance")
def verify(
    what: Annotated[
        str, Argument(metavar="PATH|URI", help="Image, folder of images, export or file with PATH.sig, or ledger.")
    ],
    key: Annotated[Path | None, Option(metavar="FILE", help="Public key of the signer, in PEM.")] = None,
    trust: Annotated[Path | None, Option(metavar="FILE", help="Root certificates that you trust, in PEM.")] = None,
    untrusted: Annotated[bool, Option("--untrusted", help="Accept images signed by anybody.")] = False,
    head: Annotated[str | None, Option(metavar="SHA256", help="An earlier head of the ledger that you know.")] = None,
    model: Annotated[str | None, Option(metavar="NAME", help="Model of the ledger; default: as on S3.")] = None,
) -> CommandOutput:
    """Verify signatures of images, exported models and ledgers without any server; one line for each thing.

    Exit code 0: all is as it was signed, by a signer that you trust. 3: something was altered, added, removed or
    renamed, or its signature is missing, expired, by another key or by an unknown signer. 2: there is nothing to
    verify, or no key to verify it with.

    Example:  darkroom verify signed/faces --trust root.pem

    Example:  darkroom verify exports/faces --key signing.pub

    Example:  darkroom verify s3://darkroom/ledger/faces --key signing.pub
    """
    from flows.signing.keys import Trust

    if untrusted and (key or trust):
        raise UserError("--untrusted accepts any signer: leave it out, or --key and --trust")
    signer_trust = Trust(key, trust)
    if not what.startswith("s3://") and not Path(what).exists() and not Path(f"{what.rstrip('/')}.sig").exists():
        raise UserError(f"there is no {what}: give the path of a file or folder, or an S3 address")
    with connect("s3") if what.startswith("s3://") else nullcontext():
        from flows.provenance.verify import verify

        checks = verify(what, signer_trust, head, model)
    return _describe_checks(checks, untrusted)


def _describe_checks(checks: "Sequence[Check]", untrusted: bool) -> CommandOutput:
    failures = [check for check in checks if not check.verified]
    unknown_signers = [check for check in checks if check.verified and not check.trusted]
    value = {
        "verified": not failures,
        "trusted": not failures and not unknown_signers,
        "checks": [check.model_dump(mode="json") for check in checks],
    }
    error = None
    if failures:
        error = VerificationError(f"{len(failures)} of {len(checks)} not verified: {failures[0]}")
    elif unknown_signers and not untrusted:
        error = VerificationError(
            f"{len(unknown_signers)} of {len(checks)} signed by nobody whom you trust: give --trust ROOTS, or "
            "--untrusted to accept any signer"
        )
    return CommandOutput(value, map(str, checks), error)
