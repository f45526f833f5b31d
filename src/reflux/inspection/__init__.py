"""What a recipe would run, whether its models fit, and whom to cite."""
