"""mmsr: MMSearch-R1 from scratch — GRPO that teaches a vision-language model when to search."""
