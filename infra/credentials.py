"""Write ``.env`` beside compose.yaml: every password and key of a new installation, made here and known nowhere else.

Run once: ``python infra/credentials.py``. Each role gets S3 keys of its own that can do what ``policies/ROLE.json``
says and no more. An ``.env`` that is there is left alone, since the servers know what it says.
"""

import argparse
import base64
import json
import os
import secrets
import sys
from pathlib import Path
from string import Template
from tempfile import NamedTemporaryFile

HERE = Path(__file__).parent
ROLES = ("worker", "sampler", "reader", "keeper", "mlflow")
"""As in ``policies/``: who trains and samples, who only samples, who only looks, who deletes, and MLflow's server."""


def policy(role: str, bucket: str) -> str:
    """What ``role`` may do in ``bucket``, in the policy language of Amazon's IAM."""
    return Template((HERE / "policies" / f"{role}.json").read_text()).substitute(bucket=bucket)


def s3_configuration(keys: dict[str, tuple[str, str]], bucket: str) -> str:
    """SeaweedFS' identities, one line of JSON: ``keys`` are access and secret key by role."""
    identities = [
        {"name": role, "credentials": [{"accessKey": access, "secretKey": secret}], "policyNames": [role]}
        for role, (access, secret) in keys.items()
    ]
    policies = [{"name": role, "content": json.dumps(json.loads(policy(role, bucket)))} for role in keys]
    return json.dumps({"identities": identities, "policies": policies})


def variables(bucket: str) -> dict[str, str]:
    """What compose.yaml asks of the environment, with new passwords."""
    keys = {role: (secrets.token_hex(10), secrets.token_hex(20)) for role in ROLES}
    passwords = (
        "POSTGRES_PASSWORD",
        "MLFLOW_DB_PASSWORD",
        "PREFECT_DB_PASSWORD",
        "MLFLOW_PASSWORD",
        "MLFLOW_SECRET_KEY",
        "STORE_KEY",
        "RAY_AUTH_TOKEN",
    )
    return (
        {"DARKROOM_BUCKET": bucket}
        | {name: secrets.token_urlsafe(24) for name in passwords}
        | {"MLFLOW_WEBHOOK_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()}  # of Fernet
        | {"PREFECT_AUTH_STRING": f"darkroom:{secrets.token_urlsafe(24)}"}
        | {f"{role}_ACCESS_KEY_ID".upper(): access for role, (access, _) in keys.items()}
        | {f"{role}_SECRET_ACCESS_KEY".upper(): secret for role, (_, secret) in keys.items()}
        | {"S3_CONFIG": s3_configuration(keys, bucket)}
    )


def main() -> None:
    """Write the file, readable by its owner alone."""
    parser = argparse.ArgumentParser(description="Make the passwords and keys of a new installation.")
    parser.add_argument("--bucket", default="darkroom")
    parser.add_argument("--out", type=Path, default=HERE / ".env")
    args = parser.parse_args()
    # Without quotes, which Compose would take off and `kubectl create secret --from-env-file` would not.
    text = "".join(f"{name}={value}\n" for name, value in variables(args.bucket).items())
    # Readable by its owner alone, and linked when it is whole: a kill leaves no half of it.
    with NamedTemporaryFile("w", dir=args.out.parent, prefix=".env.") as partial:
        partial.write(text)
        partial.flush()
        try:
            os.link(partial.name, args.out)
        except FileExistsError:
            sys.exit(f"{args.out} is there, and servers know its passwords: a new installation needs another --out")


if __name__ == "__main__":
    main()
