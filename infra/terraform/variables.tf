variable "bucket" {
  description = "Name of the bucket for shards, artifacts, ledger and samples (DARKROOM_BUCKET)."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "3 to 63 lower-case letters, digits, dots and dashes."
  }
}

variable "kms_key_arn" {
  description = "The KMS key that objects are encrypted with; null: Amazon's own (SSE-S3)."
  type        = string
  default     = null
}

variable "noncurrent_days" {
  description = "Days that what was deleted or overwritten can be brought back. A takedown is complete after as many."
  type        = number
  default     = 30

  validation {
    condition     = var.noncurrent_days >= 1
    error_message = "At least a day."
  }
}

variable "roles" {
  description = "IAM roles that get each policy, by its name: worker, sampler, reader, keeper, mlflow."
  type        = map(set(string))
  default     = {}

  validation {
    condition     = length(setsubtract(keys(var.roles), ["worker", "sampler", "reader", "keeper", "mlflow"])) == 0
    error_message = "The policies are called worker, sampler, reader, keeper and mlflow."
  }
}
