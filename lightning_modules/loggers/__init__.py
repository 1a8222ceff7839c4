"""Where rows go: metrics.csv, Weights & Biases, TensorBoard."""
