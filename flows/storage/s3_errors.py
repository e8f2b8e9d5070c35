"""Errors of S3 servers and of boto3, put into one line: what, where, and how to fix it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import tenacity
from botocore import exceptions
from botocore.exceptions import BotoCoreError, ClientError

from diffusion.common.errors import DarkroomError, TransientError, UserError

WRONG_KEYS = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
DENIED = ("403", "AccessDenied", "Forbidden", *WRONG_KEYS)
ELSEWHERE = ("301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect")
AGAIN = "give the same command again, which goes on from there; if it stays so, look at the server's log"
REASONS: Mapping[tuple[str, ...], tuple[type[DarkroomError], str, str]] = {
    ("SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "Throttling", "TooManyRequests", "429", "503"): (
        TransientError,
        "takes no more requests for now",
        "give the same command again in a minute, which goes on from there, and run fewer at once",
    ),
    ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"): (
        UserError,
        "has no room left",
        "free some space in the bucket with `darkroom gc`, or raise its quota",
    ),
    ("EntityTooLarge", "413"): (UserError, "takes no object of this size", "raise its limit for uploads"),
    ("BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"): (
        TransientError,
        "received other bytes than were sent",
        "check the network and proxies on the way, then give the same command again",
    ),
    ("NotImplemented", "MethodNotAllowed", "405", "501"): (
        UserError,
        "does not know this operation",
        "use a server that does, such as Amazon's, SeaweedFS or Ceph's",
    ),
    ("RequestTimeout", "408", "504"): (TransientError, "waited too long for data", AGAIN),
    ("BucketAlreadyExists",): (UserError, "has this bucket, of another owner", "set DARKROOM_BUCKET to another name"),
    ("InvalidObjectState",): (UserError, "has the object in its archive", "restore it there first"),
    ("ConditionalRequestConflict", "OperationAborted", "PreconditionFailed", "409", "412"): (
        TransientError,
        "had another writer at the same moment",
        "give the same command again",
    ),
    ("500", "502"): (TransientError, "failed to answer the request", AGAIN),
}
"""Error, what the server says, and what to do, by the server's codes and HTTP statuses."""
NO_KEYS = exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError
DAMAGED_READS = exceptions.FlexibleChecksumError, exceptions.IncompleteReadError, exceptions.ResponseStreamingError
BROKEN_READ = tenacity.retry_if_exception_type(
    (*DAMAGED_READS, exceptions.ConnectionClosedError, exceptions.ReadTimeoutError)
)


class MissingObjectError(UserError):
    """Missing object."""


class LargeObjectError(UserError):
    """Object of more bytes than its kind may have."""


class AccessDeniedError(UserError):
    """Access denied by the server."""


class WrongCredentialsError(AccessDeniedError):
    """Credentials that the server does not know."""


class UnreachableError(TransientError, UserError):
    """Server that does not answer: it may be down for a moment, or its address be wrong."""


def get_status(error: ClientError) -> int:
    """HTTP status of the server's answer."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def is_conflict(error: BaseException) -> bool:
    """Whether two writers collided in the server (409), or a conflicting object was gone when it was read (404)."""
    if not isinstance(error, ClientError):
        return False
    return error.response["Error"]["Code"] in {"ConditionalRequestConflict", "OperationAborted"} or (
        error.operation_name in {"HeadObject", "GetObject"} and get_status(error) == 404
    )


@contextmanager
def explain_errors(server: str, bucket: str, key: str) -> Iterator[None]:
    """Turn exceptions of boto3 about an object at ``server`` into errors of one line, with the original as cause."""
    place = f"s3://{bucket}/{key}"
    try:
        yield
    except ClientError as error:
        raise _explain(error, place, bucket, server) from error
    except NO_KEYS as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UserError(f"{place}: no usable S3 credentials ({error}): {hint}") from error
    except exceptions.ParamValidationError as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    except DAMAGED_READS as error:
        hint = "check the network, then give the same command again"
        raise DarkroomError(f"{place}: what {server} sends breaks off or is damaged: {hint} ({error})") from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        hint = "is it running, and is AWS_ENDPOINT_URL_S3 right?"
        raise UnreachableError(f"{place}: the S3 server {server} does not answer: {hint} ({error})") from error
    except BotoCoreError as error:
        raise DarkroomError(f"{place}: {error} ({server})") from error


def _explain(error: ClientError, place: str, bucket: str, server: str) -> DarkroomError:
    code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    if code == "NoSuchBucket":
        hint = "create it, or set DARKROOM_BUCKET to one that is there"
        return UserError(f"{place}: there is no bucket {bucket} at {server}: {hint}")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return MissingObjectError(f"{place} does not exist at {server}")
    if code == "InvalidRange":
        return MissingObjectError(f"{place} is shorter at {server} than the requested range: it was cut, or replaced")
    if code in WRONG_KEYS:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to valid ones"
        return WrongCredentialsError(f"{place}: {server} rejects the credentials ({code}): {hint}")
    if code in DENIED:
        hint = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what that key may do"
        if code == "403":  # to a HEAD, whose answer has no body to say why
            hint += ", and this machine's clock"
        return AccessDeniedError(f"{place}: {server} denies access ({code}): {hint}")
    if code in {"RequestExpired", "RequestTimeTooSkewed"}:
        hint = "set the clock of whichever of the two is wrong"
        return UserError(f"{place}: the clocks of {server} and of this machine are too far apart ({code}): {hint}")
    if code in ELSEWHERE:
        return UserError(f"{place}: the bucket lies in another region ({code}): set AWS_DEFAULT_REGION to it")
    status = str(get_status(error))
    others = DarkroomError, "refuses the request", "check AWS_ENDPOINT_URL_S3, and look at the server's log"
    known = next((words for codes, words in REASONS.items() if code in codes), None)
    kind, reason, hint = known or next((words for codes, words in REASONS.items() if status in codes), others)
    details = f"{code}: {' '.join(message.split())}" if message else code
    return kind(f"{place}: {server} {reason} ({details}): {hint}")
