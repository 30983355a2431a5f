"""Ingredients: what the user gives, validated, and where it is loaded from."""
