"""The config: its fields, and what a run makes of them."""
