"""How an output is written, and what says where it comes from."""
