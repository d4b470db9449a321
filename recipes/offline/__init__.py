"""Real models and data that come inside packages of public registries: what the demo, the recipes and the benchmarks
run on where no Hub is in reach."""
