"""What a recipe costs, counted without a GPU and without data."""
