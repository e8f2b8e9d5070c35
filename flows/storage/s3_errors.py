"""S3 errors: translation into one-line messages, and classification for retries."""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NotConnected

from diffusion.common.errors import DarkroomError, UserError

DENIED = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
SKEWED = {"RequestExpired", "RequestTimeTooSkewed"}
ELSEWHERE = {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
DAMAGED_READS = (FlexibleChecksumError, IncompleteReadError, ResponseStreamingError)
BROKEN_READS = (*DAMAGED_READS, ConnectionClosedError, ReadTimeoutError)


class Missing(UserError):
    """Missing object."""


class Denied(UserError):
    """Access denied by the server."""


@contextmanager
def in_words(server: str, bucket: str, key: str = "") -> Iterator[None]:
    """Context that turns exceptions of boto3 into errors with a one-line message, with the original as the cause."""
    place = f"s3://{bucket}/{key}"
    try:
        yield
    except ClientError as error:
        raise _explained(error, place, bucket, server) from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UserError(f"{place}: no usable S3 credentials ({error}): {hint}") from error
    except ParamValidationError as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    except DAMAGED_READS as error:
        hint = "check the network, then give the same command again"
        raise DarkroomError(f"{place}: what {server} sends breaks off or is damaged: {hint} ({error})") from error
    except (HTTPClientError, NotConnected) as error:
        hint = "is it running, and is AWS_ENDPOINT_URL_S3 right?"
        raise UserError(f"{place}: the S3 server {server} does not answer: {hint} ({error})") from error
    except BotoCoreError as error:
        raise DarkroomError(f"{place}: {error} ({server})") from error


def _explained(error: ClientError, place: str, bucket: str, server: str) -> DarkroomError:
    code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    if code == "NoSuchBucket":
        hint = "create it, or set DARKROOM_BUCKET to one that is there"
        return UserError(f"{place}: there is no bucket {bucket} at {server}: {hint}")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return Missing(f"{place} does not exist at {server}")
    if code == "InvalidRange":
        return Missing(f"{place} is shorter at {server} than the requested range: it was cut, or replaced")
    if code in DENIED:
        hint = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what that key may do"
        if code == "403":  # to a HEAD, whose answer has no body to say why
            hint += ", and this machine's clock"
        return Denied(f"{place}: {server} denies access ({code}): {hint}")
    if code in SKEWED:
        hint = "set the clock of whichever of the two is wrong"
        return UserError(f"{place}: the clocks of {server} and of this machine are too far apart ({code}): {hint}")
    if code in ELSEWHERE:
        return UserError(f"{place}: the bucket lies in another region ({code}): set AWS_DEFAULT_REGION to it")
    return DarkroomError(f"{place}: {server} answered {code}: {message}")


def status_of(error: ClientError) -> int:
    """HTTP status of the server's answer."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def is_broken_read(error: BaseException) -> bool:
    """Whether a response body broke off or did not match the server's checksum."""
    return isinstance(error, BROKEN_READS)


def is_conflict(error: BaseException) -> bool:
    """Whether two writers collided in the server (409), or a conflicting object was gone when it was read (404)."""
    if not isinstance(error, ClientError):
        return False
    code = error.response["Error"]["Code"]
    return code in {"ConditionalRequestConflict", "OperationAborted"} or (
        error.operation_name in {"HeadObject", "GetObject"} and status_of(error) == 404
    )
