"""Weights in other people's layouts: rename tables, checked in both directions."""
