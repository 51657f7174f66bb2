"""Seeded, batched and resumable generation from a model of any kind."""

from domainstudio.sampling.folder import load_samples, sample_stored, sample_to_folder
from domainstudio.sampling.generate import Images, default_device, draw, sample

__all__ = [
    "Images",
    "default_device",
    "draw",
    "load_samples",
    "sample",
    "sample_stored",
    "sample_to_folder",
]
