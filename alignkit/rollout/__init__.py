"""Who gives groups their completions."""
