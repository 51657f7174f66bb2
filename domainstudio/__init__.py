"""Adapt a diffusion model to a visual domain from about ten images, and keep it diverse.

Importing this package has no side effects and does not import torch.
"""

__version__ = "0.1.0"
