"""A small model of the family and a rendered scene, for demonstrations and tests."""
