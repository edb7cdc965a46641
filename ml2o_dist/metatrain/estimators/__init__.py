"""Estimators of the meta-gradient by name; each module here is one."""
