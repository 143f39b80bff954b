"""Small floating-point types: their tables, scales, learned rounding, and inputs rounded to them."""
