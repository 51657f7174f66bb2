"""From an adaptation's settings to its trained model: one loop for every method and kind of model."""
