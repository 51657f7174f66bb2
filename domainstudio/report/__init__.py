"""The HTML report: every adaptation side by side, in one self-contained file."""

from domainstudio.report.page import render

__all__ = ["render"]
