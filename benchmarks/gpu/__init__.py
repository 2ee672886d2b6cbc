"""What a GPU does with the kernels and the engine: numbers right and numbers of seconds, in one command."""
