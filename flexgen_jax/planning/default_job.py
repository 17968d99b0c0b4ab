"""What a job is taken to be of which nobody says more: FlexGen's benchmark."""

# Tokens of a prompt, and new ones.
PROMPT_LEN, GEN_LEN = 512, 32
