"""What the trials of a sweep have shown: the front of several objectives, importances, pictures for the page."""
