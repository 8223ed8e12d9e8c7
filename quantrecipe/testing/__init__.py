"""For other projects' tests: the conformance suite, and Hypothesis strategies.

``quantrecipe.testing.conformance`` needs nothing but the package;
``quantrecipe.testing.strategies`` needs Hypothesis, which the extra ``test`` brings.
"""
