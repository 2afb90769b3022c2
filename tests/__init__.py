"""A package, so that no other one called tests can take its place."""
