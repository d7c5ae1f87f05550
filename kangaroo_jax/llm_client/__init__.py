"""One client of language models: requests, cache, endpoint, team."""
