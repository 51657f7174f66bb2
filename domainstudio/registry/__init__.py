"""MLflow's registered models: which version is used, why, and how it is served."""
