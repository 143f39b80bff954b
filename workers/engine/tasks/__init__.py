"""Tasks of an evaluation: rows with known answers, asked of the original model and of what ships."""
