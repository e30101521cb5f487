"""Tests of the number formats against the specification and against independent implementations."""
