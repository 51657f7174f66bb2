"""One short script per DVC stage: parse the params, call the library, write the outputs."""
