"""varl."""
