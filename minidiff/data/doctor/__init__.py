"""The data doctor: what is wrong with a folder of images before one trains on it."""
