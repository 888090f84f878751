"""Saving, resuming and exchanging weights."""
