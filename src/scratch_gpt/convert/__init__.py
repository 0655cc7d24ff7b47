"""Other model formats, in and out."""
