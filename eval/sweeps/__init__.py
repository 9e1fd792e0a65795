"""What the trials of a sweep have shown: importances, the front of objectives, pictures for the page."""
