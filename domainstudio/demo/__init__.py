"""The demo: its image domains, and small models trained from scratch. Nothing outside needs it."""
