"""A comparison of models: what it is of, the training and evaluation that are missing, its table and its page."""
