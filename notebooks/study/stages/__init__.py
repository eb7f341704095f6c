"""Tiers, the parameters of the notebooks, and what the stages 02 to 04 and 06 do."""
