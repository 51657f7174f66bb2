"""The HTML report: every adaptation side by side, in one self-contained file."""

from domainstudio.report.page import GitState, git_state, render, write

__all__ = ["GitState", "git_state", "render", "write"]
