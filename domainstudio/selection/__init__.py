"""The checkpoint to take: candidates along a training, measured by a few samples, and a rule."""
