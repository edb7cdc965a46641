"""The network of the paper: one LSTM step for every coordinate."""
