"""Learned multi-objective optimizers, meta-trained on Ray and versioned in MLflow."""
