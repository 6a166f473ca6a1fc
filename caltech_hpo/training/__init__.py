"""A recipe to epochs: models, devices, the training loop. Never imports optuna."""
