"""Losses, records of an evaluation, and differences between methods."""
