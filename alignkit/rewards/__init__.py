"""Reward sources: text → scores."""
