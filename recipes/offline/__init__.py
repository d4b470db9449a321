"""Real models and data that come inside packages of public registries, for where no Hub is in reach."""
