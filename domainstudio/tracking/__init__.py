"""MLflow's runs: one per training, found again by its key, and what a result came from."""
