"""Speed and memory: the published form of the networks against the one in use."""
