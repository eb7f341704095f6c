"""Networks, their weights, and the loop that trains them."""
