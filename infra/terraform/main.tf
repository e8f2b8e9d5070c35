# The bucket that Darkroom keeps everything large in, and who may do what in it.

resource "aws_s3_bucket" "darkroom" {
  bucket = var.bucket

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_ownership_controls" "darkroom" {
  bucket = aws_s3_bucket.darkroom.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "darkroom" {
  bucket                  = aws_s3_bucket.darkroom.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "darkroom" {
  bucket = aws_s3_bucket.darkroom.id

  rule {
    bucket_key_enabled = var.kms_key_arn != null

    apply_server_side_encryption_by_default {
      sse_algorithm     = var.kms_key_arn == null ? "AES256" : "aws:kms"
      kms_master_key_id = var.kms_key_arn
    }
  }
}

# A ledger that was overwritten or a shard that was deleted can be brought back.
resource "aws_s3_bucket_versioning" "darkroom" {
  bucket = aws_s3_bucket.darkroom.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "darkroom" {
  bucket     = aws_s3_bucket.darkroom.id
  depends_on = [aws_s3_bucket_versioning.darkroom]

  # What a killed upload left is paid for and seen by nobody.
  rule {
    id     = "abort-incomplete-uploads"
    status = "Enabled"
    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  rule {
    id     = "forget-deleted"
    status = "Enabled"
    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }
}

# What nobody may do, whatever their role: come unencrypted, overwrite what is written once, delete from the ledger.
# CreateMultipartUpload and UploadPart are s3:PutObject as well, and take no If-None-Match: they create nothing.
resource "aws_s3_bucket_policy" "darkroom" {
  bucket     = aws_s3_bucket.darkroom.id
  policy     = templatefile("${path.module}/../policies/bucket.json", { bucket = var.bucket })
  depends_on = [aws_s3_bucket_public_access_block.darkroom]
}

# The very files that compose.yaml's S3 server enforces, where tests/infra/test_policies.py tries them.
locals {
  policies = toset(["worker", "sampler", "reader", "keeper", "mlflow"])
}

resource "aws_iam_policy" "role" {
  for_each    = local.policies
  name        = "${var.bucket}-${each.key}"
  description = "What Darkroom's ${each.key} may do in ${var.bucket}"
  policy      = templatefile("${path.module}/../policies/${each.key}.json", { bucket = var.bucket })
}

resource "aws_iam_role_policy_attachment" "role" {
  for_each = {
    for pair in flatten([
      for policy, roles in var.roles : [for role in roles : { policy = policy, role = role }]
    ]) : "${pair.policy}-${pair.role}" => pair
  }

  policy_arn = aws_iam_policy.role[each.value.policy].arn
  role       = each.value.role
}

# Roles write with the key that the bucket encrypts with.
data "aws_iam_policy_document" "key" {
  count = var.kms_key_arn == null ? 0 : 1

  statement {
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.kms_key_arn]
  }
}

resource "aws_iam_policy" "key" {
  count  = var.kms_key_arn == null ? 0 : 1
  name   = "${var.bucket}-key"
  policy = data.aws_iam_policy_document.key[0].json
}

resource "aws_iam_role_policy_attachment" "key" {
  for_each   = var.kms_key_arn == null ? toset([]) : toset(flatten([for roles in var.roles : tolist(roles)]))
  policy_arn = aws_iam_policy.key[0].arn
  role       = each.key
}
