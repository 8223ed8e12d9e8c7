"""Scores of variants, prompt by prompt, compared with those of a reference. No torch."""
