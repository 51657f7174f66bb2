"""Metrics as pure functions of image features: fidelity, diversity and memorisation."""
