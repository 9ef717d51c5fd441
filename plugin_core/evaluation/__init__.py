"""Reading and checking a dataset's files, and measuring a detector's contextual bias."""
