"""Prefect flows over the stages of `dvc.yaml`. DVC decides what runs; flows start, queue and show it."""
