"""Our networks against other people's. A package, so that its files may be named as those one folder up."""
