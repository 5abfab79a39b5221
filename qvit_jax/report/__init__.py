"""What a table of rows looks like: figures, the page, results.json."""
