"""Sweeps as a Prefect flow whose settings run on a Ray cluster."""
