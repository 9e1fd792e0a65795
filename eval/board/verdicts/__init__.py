"""Every verdict of a board: side by side on pages of prompts, and on a page for each model."""
