"""Run directories: a local folder or a URI, and the files in it."""
