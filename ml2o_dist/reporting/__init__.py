"""Tables, pictures and pages of every kind of run."""
