"""Figures of several runs that differ in their seed alone, and what they say together."""
