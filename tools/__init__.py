"""Programs around the product, run from a clone: none of them is installed with it."""
