"""The two passes of a mixture, and what spares them."""
