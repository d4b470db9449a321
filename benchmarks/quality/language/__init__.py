"""Does a fleet's basis help a language model? Instruction tasks on SmolLM2-135M, leave one task out."""
