output "bucket" {
  description = "For DARKROOM_BUCKET."
  value       = aws_s3_bucket.darkroom.id
}

output "policies" {
  description = "ARNs of the policies by name, for roles that are made elsewhere."
  value       = { for name, policy in aws_iam_policy.role : name => policy.arn }
}
