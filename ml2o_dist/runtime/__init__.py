"""What every room stands on: files, errors, seeds, signals, Ray."""
