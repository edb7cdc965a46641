"""The basis of all other packages: files, errors, seeds, signals, Ray."""
