"""The pipeline as one Prefect flow: a task per stage, GPU slots, clones of the repository, summaries."""
