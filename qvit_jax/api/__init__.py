"""What a program or a notebook calls."""
