"""Whole trainings from nothing, with every number."""
