"""Measurements behind the project's figures, each one command."""
