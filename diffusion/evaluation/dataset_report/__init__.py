"""HTML report on a data set version: its contents, and how the images it adds compare with its parent's."""

from diffusion.evaluation.dataset_report.page import DatasetSummary, write_dataset_report

__all__ = ["DatasetSummary", "write_dataset_report"]
