"""Photos, videos and files of weights."""
