"""All runs of a grid put together, and all published tiers."""
