"""The training loop, which knows neither model, method nor data."""
