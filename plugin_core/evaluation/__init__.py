"""What a detector's results say, and what a dataset's files do."""
