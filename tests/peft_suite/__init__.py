"""PEFT's own test suite, with rows for this method put in; see `run`."""
