"""What is asked for and what is answered: prompts, sampling parameters, tokens, texts, outputs."""
