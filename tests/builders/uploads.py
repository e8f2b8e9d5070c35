"""Unfinished uploads in parts."""

from flows.storage.s3 import Store


def begun(store: Store, bucket: str, prefix: str = "") -> list[str]:
    """Keys of the uploads that are under way."""
    found = store.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return sorted(each["Key"] for each in found.get("Uploads", ()))


def orphan(store: Store, bucket: str, key: str) -> None:
    """What a killed process leaves."""
    upload = store.client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    store.client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
