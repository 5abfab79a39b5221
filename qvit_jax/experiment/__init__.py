"""Everything that one config describes, put together."""
