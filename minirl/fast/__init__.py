"""What makes training fast and changes no result: each of it can be taken away with no change but in time."""
