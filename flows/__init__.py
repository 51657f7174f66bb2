"""Prefect flows over the stages of `dvc.yaml`: they start DVC, queue, watch and show; DVC decides."""
