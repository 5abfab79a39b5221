"""Files that other runtimes execute, and these runtimes."""
