"""The science: images to shards, shards to a diffusion model, a model to images.

Plain PyTorch and files. Nothing here knows of Prefect, MLflow, DVC or S3; what is needed of them
is stated as a protocol (see ``diffusion.training.logging``).
"""
