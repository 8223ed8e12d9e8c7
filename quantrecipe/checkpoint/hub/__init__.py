"""Sources in repositories of the Hugging Face Hub.

The Hub's client is imported where it is used, and not before.
"""
