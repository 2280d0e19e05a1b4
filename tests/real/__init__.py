"""Runs on real models and data."""
