"""Data sets as other tools read them: a class for each format, which is imported below."""

from diffusion.common.config import classes_in

# isort: off
from diffusion.data.export.base import ExportFormat
from diffusion.data.export.imagefolder import ImageFolder as ImageFolder
from diffusion.data.export.parquet_files import ParquetFiles as ParquetFiles
from diffusion.data.export.webdataset import WebDatasetShards as WebDatasetShards
# isort: on

FORMATS = {kind.name: kind for kind in classes_in(globals(), ExportFormat)}  # type: ignore[type-abstract]
"""Formats of an export by their names."""
