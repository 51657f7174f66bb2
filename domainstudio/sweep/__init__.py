"""Sweeps: settings of an adaptation tried side by side, and which one is the best."""
