"""Run directories: a folder, here or at a URI, and what lies in it."""
