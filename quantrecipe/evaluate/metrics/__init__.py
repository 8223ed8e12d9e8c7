"""Metrics: one number for an output, from a reference output or from a prompt's text."""
