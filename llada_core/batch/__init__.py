"""python -m llada_core.batch: a file of requests through as many workers as there are, on Ray Data."""
