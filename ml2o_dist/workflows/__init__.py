"""The work of each command, from settings to results; joins the other subpackages."""
