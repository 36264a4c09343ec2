"""The flight recorder: what a fine-tune did, measured while it ran."""
