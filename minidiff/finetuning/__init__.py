"""A trained model goes on learning: full, LoRA, textual inversion, DreamBooth."""
