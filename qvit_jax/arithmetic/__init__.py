"""How one product is multiplied."""
