"""What a model is worth: features, metrics, and tables of them."""
