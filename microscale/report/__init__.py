"""What a format or a recipe costs and gives on a real checkpoint: measured and ranked; as data, text, HTML, PNG."""

from microscale.report.compare import compare
from microscale.report.results import CompareReport

__all__ = ["CompareReport", "compare"]
