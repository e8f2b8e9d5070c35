"""A version of a data set as one HTML page: what is in it, and what it brings that its parent had not."""

from diffusion.evaluation.dataset_report.page import write_dataset_report
from diffusion.evaluation.dataset_report.summary import DatasetSummary

__all__ = ["DatasetSummary", "write_dataset_report"]
