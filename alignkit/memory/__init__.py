"""How much memory a run will take, before it takes any: no weights, no GPU, no run."""
